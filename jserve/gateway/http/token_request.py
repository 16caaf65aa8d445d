"""Bodies of `/tokenize` and `/detokenize` → frozen requests; values are checked by the routes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jserve.core.errors import RequestError
from jserve.gateway.http.fields import Fields

_TOKENIZE_FIELDS = (
    *("model", "prompt", "messages", "add_special_tokens", "add_generation_prompt"),
    "return_token_strs",
)
_DETOKENIZE_FIELDS = ("model", "tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizeRequest:
    """Either `prompt` or `messages` is given; None is unset."""

    model: str | None
    prompt: str | None
    messages: Any  # unchecked; `chat.check_messages` does it
    add_special_tokens: bool | None
    add_generation_prompt: bool
    return_token_strs: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class DetokenizeRequest:
    model: str | None
    tokens: Any  # unchecked; `validation.token_ids` does it


def parse_tokenize(body: Mapping[str, Any]) -> TokenizeRequest:
    """Reads the body of `POST /tokenize`.

    Raises RequestError if a field is unknown or has the wrong type.
    """
    fields = Fields(body)
    request = TokenizeRequest(
        model=fields.string("model"),
        prompt=fields.string("prompt"),
        messages=fields.raw("messages"),
        add_special_tokens=fields.boolean("add_special_tokens"),
        add_generation_prompt=fields.boolean("add_generation_prompt") is not False,
        return_token_strs=fields.boolean("return_token_strs") or False,
    )
    if (request.prompt is None) is (request.messages is None):
        raise RequestError("give either prompt or messages", param="prompt")
    fields.finish({}, _TOKENIZE_FIELDS)
    return request


def parse_detokenize(body: Mapping[str, Any]) -> DetokenizeRequest:
    """Reads the body of `POST /detokenize`. Raises RequestError like `parse_tokenize`."""
    fields = Fields(body)
    request = DetokenizeRequest(model=fields.string("model"), tokens=fields.raw("tokens"))
    fields.finish({}, _DETOKENIZE_FIELDS)
    return request
