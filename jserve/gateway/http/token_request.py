"""Bodies of `/tokenize` and `/detokenize` → frozen requests; values are checked by the routes."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from jserve.core.errors import RequestError
from jserve.gateway.http.fields import Fields
from jserve.gateway.http.openai_request import generation_prompt_fields, template_variables
from jserve.gateway.http.openai_tools import read_tools
from jserve.gateway.tools.format import Tool

_TOKENIZE_FIELDS = (
    *("model", "prompt", "messages", "add_special_tokens", "add_generation_prompt"),
    *("return_token_strs", "chat_template_kwargs", "reasoning_effort"),
    *("tools", "continue_final_message", "chat_template"),
)
# Fields of vLLM that are not served, with the values that ask for nothing.
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
}
_DETOKENIZE_FIELDS = ("model", "tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizeRequest:
    """Either `prompt` or `messages` is given; None is unset."""

    model: str | None
    prompt: str | None
    messages: Any  # unchecked; `messages.check_messages` does it
    add_special_tokens: bool | None
    add_generation_prompt: bool
    return_token_strs: bool
    template_variables: dict[str, Any]
    tools: tuple[Tool, ...]
    continue_final_message: bool
    chat_template: str | None
    ignored: tuple[str, ...]  # names of unknown fields, where those are not refused


@dataclass(frozen=True, slots=True, kw_only=True)
class DetokenizeRequest:
    model: str | None
    tokens: Any  # unchecked; `validation.token_ids` does it
    ignored: tuple[str, ...]


def parse_tokenize(body: Mapping[str, Any], *, ignore_unknown: bool = False) -> TokenizeRequest:
    """Reads the body of `POST /tokenize`.

    Raises RequestError if a field has the wrong type, or is unknown without `ignore_unknown`.
    """
    ignored: list[str] = []
    fields = Fields(body, ignored=ignored if ignore_unknown else None)
    generation_prompt, continues = generation_prompt_fields(fields)
    request = TokenizeRequest(
        model=fields.string("model"),
        prompt=fields.string("prompt"),
        messages=fields.raw("messages"),
        add_special_tokens=fields.boolean("add_special_tokens"),
        add_generation_prompt=generation_prompt,
        return_token_strs=fields.boolean("return_token_strs") or False,
        template_variables=template_variables(fields)[1],
        tools=read_tools(fields).tools,
        continue_final_message=continues,
        chat_template=fields.string("chat_template"),
        ignored=(),
    )
    if (request.prompt is None) is (request.messages is None):
        raise RequestError("give either prompt or messages", param="prompt")
    fields.finish(_UNSUPPORTED, _TOKENIZE_FIELDS)
    return replace(request, ignored=tuple(ignored))


def parse_detokenize(body: Mapping[str, Any], *, ignore_unknown: bool = False) -> DetokenizeRequest:
    """Reads the body of `POST /detokenize`. Raises RequestError like `parse_tokenize`."""
    ignored: list[str] = []
    fields = Fields(body, ignored=ignored if ignore_unknown else None)
    model, tokens = fields.string("model"), fields.raw("tokens")
    fields.finish({}, _DETOKENIZE_FIELDS)
    return DetokenizeRequest(model=model, tokens=tokens, ignored=tuple(ignored))
