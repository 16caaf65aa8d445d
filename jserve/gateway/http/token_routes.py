"""`/tokenize` and `/detokenize`, as vLLM has them."""

import asyncio
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from jserve.core.errors import RequestError
from jserve.gateway.http.body import read_json
from jserve.gateway.http.fields import Fields
from jserve.gateway.http.openai_routes import json_response
from jserve.gateway.request_plane import Prompt, RequestPlane
from jserve.gateway.validation import token_ids

_FIELDS = ("model", "prompt", "messages", "add_special_tokens", "add_generation_prompt")


class TokenRoutes:
    """Routes that tokenize and detokenize without generating."""

    def __init__(self, plane: RequestPlane) -> None:
        self._plane = plane

    def routes(self) -> list[Route]:
        return [
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
        ]

    async def tokenize(self, request: Request) -> Response:
        """The ids of `prompt`, or of `messages` rendered by the chat template."""
        fields = Fields(await read_json(request, self._plane.config))
        self._plane.check_model(fields.string("model"))
        prompt = await self._prompt(fields)
        texts: list[str] | None = None
        if fields.boolean("return_token_strs"):
            texts = await asyncio.to_thread(self._texts, prompt.ids)
        fields.finish({}, (*_FIELDS, "return_token_strs"))
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
        fields = Fields(await read_json(request, self._plane.config))
        self._plane.check_model(fields.string("model"))
        given: Any = fields.raw("tokens")
        fields.finish({}, ("model", "tokens"))
        ids = token_ids("tokens", given, self._plane.info.vocab)
        decode = self._plane.tokenizer.decode
        text = await asyncio.to_thread(decode, ids, skip_special_tokens=False)
        return json_response({"prompt": text})

    def _texts(self, ids: Sequence[int]) -> list[str]:
        return [self._plane.tokenizer.token_text(token_id) for token_id in ids]

    async def _prompt(self, fields: Fields) -> Prompt:
        text, messages = fields.string("prompt"), fields.raw("messages")
        special = fields.boolean("add_special_tokens")
        generation = fields.boolean("add_generation_prompt")
        if (text is None) is (messages is None):
            raise RequestError("give either prompt or messages", param="prompt")
        if text is not None:
            return await self._plane.text_prompt(text, add_special_tokens=special)
        return await self._plane.chat_prompt(
            messages,
            add_generation_prompt=generation is not False,
        )
