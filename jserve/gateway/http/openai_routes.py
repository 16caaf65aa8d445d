"""Routes of the OpenAI API: models, completions and chat completions, streamed and not."""

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from jserve.gateway.conversation import prepare, render
from jserve.gateway.http.edge import IGNORED_FIELDS
from jserve.gateway.http.event_stream import EventStream, unless_disconnected
from jserve.gateway.http.openai_answer import Answer
from jserve.gateway.http.openai_conversation import conversation_of
from jserve.gateway.http.openai_request import (
    ChatRequest,
    CompletionRequest,
    OpenAIRequest,
)
from jserve.gateway.http.openai_response import Head, TokenIds, TokenText
from jserve.gateway.http.openai_shape import ChatShape, CompletionShape, Shape
from jserve.gateway.http.request_bodies import RequestBodies
from jserve.gateway.metrics import GatewayMetrics
from jserve.gateway.pauses import Pauses
from jserve.gateway.request_plane import GenerationRequest, Prompt, RequestPlane
from jserve.gateway.tenants import Caller
from jserve.gateway.validation import check_id_lists

# OpenAI's default of completions, and vLLM's, whatever the generation config says; a chat goes on
# until the model ends it.
_COMPLETION_TOKENS = 16


def json_response(value: Mapping[str, Any]) -> Response:
    """Responds with `value` and status 200."""
    return Response(orjson.dumps(value), media_type="application/json")


class OpenAIRoutes:
    """Answers the OpenAI routes. `unix_s` is the clock behind `created`."""

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
        self._start_s = int(unix_s())

    def routes(self) -> list[Route]:
        return [
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/v1/models/{id:path}", self.model, methods=["GET"]),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat_completions, methods=["POST"]),
            Route("/v1/chat/completions/render", self.render, methods=["POST"]),
        ]

    async def models(self, request: Request) -> Response:
        data = [self._model(name) for name in self._plane.model_names]
        return json_response({"object": "list", "data": data})

    async def model(self, request: Request) -> Response:
        """The served model, if `id` names it."""
        name: str = request.path_params["id"]
        self._plane.check_model(name)
        return json_response(self._model(name))

    async def completions(self, request: Request) -> Response:
        asked = await self._bodies.completion(request)
        self._plane.check_model(asked.model)
        caller: Caller = request.scope["caller"]
        with self._plane.preparing(caller, len(asked.prompts), asked.best_of):
            prompts = await self._prompts(asked)
            generations = await self._prepare(caller, _with_echo(asked), prompts)
        shape = CompletionShape(
            generations,
            self._tokens(asked),
            top=asked.sampling.logprobs,
            prompt_logprobs=asked.sampling.prompt_logprobs is not None,
            token_ids=asked.return_token_ids,
        )
        num_best = asked.n if asked.best_of > asked.n else None
        return await self._respond(request, asked, generations, shape, num_best)

    async def chat_completions(self, request: Request) -> Response:
        asked = await self._bodies.chat(request)
        self._plane.check_model(asked.model)
        caller: Caller = request.scope["caller"]
        with self._plane.preparing(caller, 1, asked.n):
            conversation = conversation_of(self._plane, asked)
            prepared = await prepare(
                self._plane,
                conversation,
                id=f"chatcmpl-{uuid.uuid4().hex}",
                caller=caller,
                ignored=request.scope.get(IGNORED_FIELDS),
            )
        shape = ChatShape(
            self._tokens(asked),
            prepared,
            include_reasoning=asked.include_reasoning,
            token_ids=asked.return_token_ids,
            echo=conversation.final_text if asked.echo else "",
        )
        return await self._respond(request, asked, (prepared.generation,), shape)

    async def render(self, request: Request) -> Response:
        """The prompt of a chat, and its token ids, without an answer."""
        asked = await self._bodies.chat(request)
        self._plane.check_model(asked.model)
        caller: Caller = request.scope["caller"]
        with self._plane.preparing(caller, 1, None):
            prompt = await render(
                self._plane,
                conversation_of(self._plane, asked),
                caller=caller,
                ignored=request.scope.get(IGNORED_FIELDS),
            )
        return json_response(
            {
                "object": "chat.completion.prompt",
                "model": self._plane.model_name,
                "prompt": prompt.text,
                "token_ids": prompt.ids,
                "count": len(prompt.ids),
                "max_model_len": self._plane.info.max_model_len,
            }
        )

    def _tokens(self, asked: OpenAIRequest) -> TokenText:
        tokens = self._plane.tokenizer
        return TokenIds(tokens) if asked.tokens_as_ids else tokens

    def _model(self, name: str) -> dict[str, Any]:
        info = self._plane.info
        return {
            "id": name,
            "object": "model",
            "created": self._start_s,
            "owned_by": "jserve",
            "root": info.model,
            "parent": None,
            "max_model_len": info.max_model_len,
        }

    async def _prompts(self, asked: CompletionRequest) -> list[Prompt]:
        """Texts are tokenized together; a request has texts or token ids."""
        texts = [it for it in asked.prompts if isinstance(it, str)]
        truncation = self._plane.prompts.bounded(asked.truncation, asked.sampling.max_tokens)
        if texts:
            return await self._plane.prompts.of_texts(
                texts, add_special_tokens=asked.add_special_tokens, truncation=truncation
            )
        pauses = Pauses()
        prompts: list[Prompt] = []
        for ids in asked.prompts:
            assert not isinstance(ids, str)
            prompts.append(self._plane.prompts.of_ids(ids, truncation))
            await pauses.end()
        return prompts

    async def _prepare(
        self,
        caller: Caller,
        asked: CompletionRequest,
        prompts: Sequence[Prompt],
    ) -> tuple[GenerationRequest, ...]:
        # The first generation has the id of the answer.
        answer_id = f"cmpl-{uuid.uuid4().hex}"
        constraint = await self._plane.constraint(asked.structured, caller)
        constraint = self._plane.with_bad_words(constraint, asked.bad_words)
        sampling = check_id_lists(asked.sampling, self._plane.info)
        if asked.best_of > asked.n and sampling.logprobs is None:
            sampling = replace(sampling, logprobs=0)  # the best choices are known by them
        pauses = Pauses()
        generations: list[GenerationRequest] = []
        for i, prompt in enumerate(prompts):
            generation = self._plane.prepare(
                id=f"{answer_id}-{i}" if i else answer_id,
                prompt=prompt,
                sampling=sampling,
                caller=caller,
                constraint=constraint,
                stop=asked.stop,
                n=asked.best_of,
                priority=asked.priority,
                echo=asked.echo,
                skip_special_tokens=asked.skip_special_tokens,
                include_stop_str_in_output=asked.include_stop_str_in_output,
                default_max_tokens=self._default_max_tokens(asked),
                cache_salt=asked.cache_salt,
            )
            generations.append(generation)
            await pauses.end()
        return tuple(generations)

    def _default_max_tokens(self, asked: CompletionRequest) -> int | None:
        """The default that comes before that of the model."""
        if asked.unlimited:
            return self._plane.info.max_model_len
        if self._plane.config.default_max_tokens is not None:
            return None
        return _COMPLETION_TOKENS

    async def _respond(
        self,
        request: Request,
        asked: CompletionRequest | ChatRequest,
        generations: tuple[GenerationRequest, ...],
        shape: Shape,
        num_best: int | None = None,
    ) -> Response:
        answer = Answer(
            head=Head(
                generations[0].id,
                int(self._unix_s()),
                self._plane.model_name,
                self._plane.fingerprint,
            ),
            generations=generations,
            shape=shape,
            plane=self._plane,
            metrics=self._metrics,
            include_usage=asked.include_usage,
            continuous_usage=asked.continuous_usage,
            num_best=num_best,
        )
        if asked.stream:
            keep_alive_s = self._plane.config.sse_keep_alive_s
            return EventStream(answer.events(), keep_alive_s=keep_alive_s)
        body = await unless_disconnected(request.receive, answer.whole())
        return Response(body, media_type="application/json")


def _with_echo(asked: CompletionRequest) -> CompletionRequest:
    # OpenAI: logprobs cover an echoed prompt as well.
    sampling = asked.sampling
    if not asked.echo or sampling.logprobs is None or sampling.prompt_logprobs is not None:
        return asked
    return replace(asked, sampling=replace(sampling, prompt_logprobs=sampling.logprobs))
