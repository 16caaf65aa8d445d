"""Routes of the Ollama API: chat and generate, streamed and not, and what models there are."""

import hashlib
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from jserve.gateway.chat_formats import ChatFormats
from jserve.gateway.conversation import PreparedChat, prepare
from jserve.gateway.http.edge import IGNORED_FIELDS
from jserve.gateway.http.event_stream import EventStream, unless_disconnected
from jserve.gateway.http.ollama.answer import (
    Head,
    LineStream,
    OllamaAnswer,
    Piece,
    Shape,
    chat_shape,
    generate_shape,
)
from jserve.gateway.http.ollama.request import OllamaRequest
from jserve.gateway.http.request_bodies import RequestBodies
from jserve.gateway.metrics import GatewayMetrics
from jserve.gateway.request_plane import RequestPlane
from jserve.gateway.tenants import Caller
from jserve.gateway.tools.format import AUTO
from jserve.gateway.validation import check_id_lists

_TAG = ":latest"  # Ollama's names without a tag have this one
# The version whose API this is: clients compare it with the oldest that has what they need.
_API_VERSION = "0.12.0"
_FOREVER = "9999-12-31T23:59:59Z"
_LINES = LineStream()


class OllamaRoutes:
    """Answers the Ollama routes. `unix_s` is the clock behind `created_at`."""

    def __init__(
        self,
        plane: RequestPlane,
        metrics: GatewayMetrics,
        bodies: RequestBodies,
        *,
        unix_s: Callable[[], float] = time.time,
    ) -> None:
        self._plane = plane
        self._metrics = metrics
        self._bodies = bodies
        self._unix_s = unix_s
        self._started = Head("", unix_s).json(done=True)["created_at"]

    def routes(self) -> list[Route]:
        return [
            Route("/api/chat", self.chat, methods=["POST"]),
            Route("/api/generate", self.generate, methods=["POST"]),
            Route("/api/show", self.show, methods=["POST"]),
            Route("/api/tags", self.tags, methods=["GET"]),
            Route("/api/ps", self.running, methods=["GET"]),
            Route("/api/version", self.version, methods=["GET"]),
        ]

    async def chat(self, request: Request) -> Response:
        start_s = self._plane.clock.now_s()
        asked = await self._bodies.ollama_chat(request)
        return await self._answer(request, asked, chat_shape, start_s)

    async def generate(self, request: Request) -> Response:
        start_s = self._plane.clock.now_s()
        asked = await self._bodies.ollama_generate(request)
        return await self._answer(request, asked, generate_shape, start_s)

    async def show(self, request: Request) -> Response:
        """What is known of the model."""
        asked = await self._bodies.ollama_show(request)
        self._check_model(asked.model)
        plane, info = self._plane, self._plane.info
        capabilities = ["completion"]
        if plane.chat_template is not None and plane.formats.tools is not None:
            capabilities.append("tools")
        if plane.formats.reasoning is not None:
            capabilities.append("thinking")
        template = plane.chat_template
        return _json(
            {
                "modelfile": f"# served by jserve\nFROM {info.model}",
                "parameters": self._parameters(),
                "template": "" if template is None else template.source,
                "details": self._details(),
                "model_info": {
                    "general.architecture": "jserve",
                    "general.basename": info.model,
                    "jserve.context_length": info.max_model_len,
                    "jserve.vocab_size": info.vocab,
                },
                "capabilities": capabilities,
                "modified_at": self._started,
            }
        )

    async def tags(self, request: Request) -> Response:
        """The names of the model."""
        models = [self._model(name) | {"modified_at": self._started} for name in self._names()]
        return _json({"models": models})

    async def running(self, request: Request) -> Response:
        """The models in memory, which is the one that is served."""
        more = {
            "expires_at": _FOREVER,
            "size_vram": 0,
            "context_length": self._plane.info.max_model_len,
        }
        return _json({"models": [self._model(self._names()[0]) | more]})

    async def version(self, request: Request) -> Response:
        return _json({"version": _API_VERSION})

    async def _answer(
        self, request: Request, asked: OllamaRequest, shape: Shape, start_s: float
    ) -> Response:
        self._check_model(asked.model)
        head = Head(asked.model, self._unix_s)
        if not asked.conversation.messages:
            # The model is in memory, and stays there.
            reason = "unload" if asked.unloads else "load"
            return _json(head.json(done=True) | shape(Piece()) | {"done_reason": reason})
        caller: Caller = request.scope["caller"]
        with self._plane.preparing(caller, 1, 1):
            prepared = await self._prepare(asked, caller, request.scope.get(IGNORED_FIELDS))
        answer = OllamaAnswer(
            prepared=prepared,
            head=head,
            shape=shape,
            plane=self._plane,
            metrics=self._metrics,
            start_s=start_s,
        )
        if asked.stream:
            keep_alive_s = self._plane.config.sse_keep_alive_s
            return EventStream(answer.lines(), keep_alive_s=keep_alive_s, form=_LINES)
        body = await unless_disconnected(request.receive, answer.whole())
        return Response(body, media_type="application/json")

    async def _prepare(
        self, asked: OllamaRequest, caller: Caller, ignored: list[str] | None
    ) -> PreparedChat:
        plane, conversation = self._plane, asked.conversation
        answer_id = f"ollama-{uuid.uuid4().hex}"
        # A model without a template reads a prompt as it is, unless there is a system message.
        plain = bool(asked.prompt) and plane.chat_template is None
        if not asked.raw and not (plain and len(conversation.messages) == 1):
            return await prepare(plane, conversation, id=answer_id, caller=caller, ignored=ignored)
        generation = plane.prepare(
            id=answer_id,
            prompt=await plane.prompts.of_text(asked.prompt),
            sampling=check_id_lists(conversation.sampling, plane.info),
            caller=caller,
            constraint=await plane.constraint(conversation.structured, caller),
            stop=conversation.stop,
            default_max_tokens=conversation.default_max_tokens,
        )
        return PreparedChat(generation, ChatFormats(), (), AUTO, False, ())

    def _check_model(self, name: str) -> None:
        base = name.removesuffix(_TAG)
        self._plane.check_model(base if base in self._plane.model_names else name)

    def _names(self) -> list[str]:
        """Names of the model as Ollama has them, with a tag."""
        names = self._plane.model_names
        return [name if ":" in name else name + _TAG for name in names]

    def _model(self, name: str) -> dict[str, Any]:
        digest = hashlib.sha256(self._plane.fingerprint.encode()).hexdigest()
        return {
            "name": name,
            "model": name,
            "size": 0,
            "digest": digest,
            "details": self._details(),
        }

    def _details(self) -> dict[str, Any]:
        return {
            "parent_model": "",
            "format": "",
            "family": "jserve",
            "families": ["jserve"],
            "parameter_size": "",
            "quantization_level": "",
        }

    def _parameters(self) -> str:
        """The default sampling in lines of Ollama's model files."""
        defaults = self._plane.defaults
        values = {
            "temperature": defaults.temperature,
            "top_k": defaults.top_k,
            "top_p": defaults.top_p,
            "min_p": defaults.min_p,
            "repeat_penalty": defaults.repetition_penalty,
        }
        return "\n".join(f"{name} {value}" for name, value in values.items())


def _json(value: Mapping[str, Any]) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")
