"""`/tokenize` and `/detokenize`, as vLLM has them."""

from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from jserve.gateway.conversation import Conversation, render
from jserve.gateway.http.edge import IGNORED_FIELDS
from jserve.gateway.http.openai_routes import json_response
from jserve.gateway.http.request_bodies import RequestBodies
from jserve.gateway.http.token_request import TokenizeRequest
from jserve.gateway.http.tokenizer_info import tokenizer_info
from jserve.gateway.pauses import Pauses
from jserve.gateway.request_plane import Prompt, RequestPlane
from jserve.gateway.tenants import Caller

_TEXTS_AT_A_TIME = 1024


class TokenRoutes:
    """Routes that tokenize and detokenize without generating."""

    def __init__(self, plane: RequestPlane, bodies: RequestBodies) -> None:
        self._plane = plane
        self._bodies = bodies

    def routes(self) -> list[Route]:
        return [
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
            Route("/tokenizer_info", self.tokenizer_info, methods=["GET"]),
        ]

    async def tokenize(self, request: Request) -> Response:
        """The ids of `prompt`, or of `messages` rendered by the chat template."""
        asked = await self._bodies.tokenize(request)
        self._plane.check_model(asked.model)
        caller: Caller = request.scope["caller"]
        with self._plane.preparing(caller, 1, None):
            prompt = await self._prompt(asked, caller, request.scope.get(IGNORED_FIELDS))
            texts = await self._texts(prompt.ids) if asked.return_token_strs else None
        return json_response(
            {
                "count": len(prompt.ids),
                "max_model_len": self._plane.info.max_model_len,
                "tokens": prompt.ids,
                "token_strs": texts,
            }
        )

    async def detokenize(self, request: Request) -> Response:
        """The text of `tokens`, special tokens included."""
        asked = await self._bodies.detokenize(request)
        self._plane.check_model(asked.model)
        with self._plane.preparing(request.scope["caller"], 1, None):
            text = await self._plane.prompts.detokenize("tokens", asked.tokens)
        return json_response({"prompt": text})

    async def tokenizer_info(self, request: Request) -> Response:
        """The tokenizer's settings, with which a client can render chats and count tokens."""
        return json_response(tokenizer_info(self._plane))

    async def _texts(self, ids: Sequence[int]) -> list[str]:
        pauses = Pauses()
        texts: list[str] = []
        for start in range(0, len(ids), _TEXTS_AT_A_TIME):
            texts += map(self._plane.tokenizer.token_name, ids[start : start + _TEXTS_AT_A_TIME])
            await pauses.end()
        return texts

    async def _prompt(
        self, asked: TokenizeRequest, caller: Caller, ignored: list[str] | None
    ) -> Prompt:
        most = self._plane.prompts.most_counted
        if asked.prompt is not None:
            return await self._plane.prompts.of_text(
                asked.prompt, add_special_tokens=asked.add_special_tokens, most=most
            )
        conversation = Conversation(
            messages=asked.messages,
            tools=asked.tools,
            add_generation_prompt=asked.add_generation_prompt,
            continue_final_message=asked.continue_final_message,
            variables=asked.template_variables,
            chat_template=asked.chat_template,
        )
        return await render(self._plane, conversation, caller=caller, ignored=ignored, most=most)
