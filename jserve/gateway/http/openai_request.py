"""OpenAI request bodies → frozen requests: types are checked here, values by the request plane.

What is honoured, accepted without effect or refused is listed in `openai_fields`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jserve.core.errors import RequestError
from jserve.core.request import MAX_LOGPROBS
from jserve.gateway.http import openai_fields as known
from jserve.gateway.http.fields import Fields, wrong_type
from jserve.gateway.validation import SamplingFields


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenAIRequest:
    """Fields that both generating routes share. None is unset: the model's default applies."""

    model: str | None
    sampling: SamplingFields
    stop: Any  # unchecked; `validation.check_stop` does it
    n: int
    stream: bool
    include_usage: bool
    skip_special_tokens: bool | None
    include_stop_str_in_output: bool | None
    priority: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionRequest(OpenAIRequest):
    prompts: tuple[str | tuple[int, ...], ...]  # not empty; each text or token ids
    echo: bool
    add_special_tokens: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest(OpenAIRequest):
    messages: Any  # unchecked; `chat.check_messages` does it
    add_generation_prompt: bool


def parse_completion(
    body: Mapping[str, Any], *, max_prompts: int | None = None
) -> CompletionRequest:
    """Reads the body of `POST /v1/completions`. More prompts are refused before they are read.

    Raises:
        RequestError: a field has the wrong type, is unknown or is not supported.
    """
    fields = Fields(body)
    prompts = _prompts(fields, max_prompts)
    n = _choices(fields)
    best_of = fields.integer("best_of")
    if best_of not in (None, 1, n):
        raise RequestError("best_of: not supported yet; use n", param="best_of")
    echo = fields.boolean("echo") or False
    logprobs = fields.raw("logprobs")
    sampling = _sampling(fields, logprobs=logprobs, max_tokens=fields.raw("max_tokens"))
    shared = _shared(fields)
    special = fields.boolean("add_special_tokens")
    fields.finish(known.UNSUPPORTED_COMPLETION, known.COMPLETION_FIELDS)
    return CompletionRequest(
        prompts=prompts, echo=echo, add_special_tokens=special, n=n, sampling=sampling, **shared
    )


def parse_chat(body: Mapping[str, Any]) -> ChatRequest:
    """Reads the body of `POST /v1/chat/completions`.

    Raises:
        RequestError: a field has the wrong type, is unknown or is not supported.
    """
    fields = Fields(body)
    generation_prompt = fields.boolean("add_generation_prompt")
    logprobs, max_tokens = _chat_logprobs(fields), _chat_max_tokens(fields)
    sampling = _sampling(fields, logprobs=logprobs, max_tokens=max_tokens)
    n = _choices(fields)
    shared = _shared(fields)
    messages = fields.raw("messages")
    fields.finish(known.UNSUPPORTED_CHAT, known.CHAT_FIELDS)
    return ChatRequest(
        messages=messages,
        add_generation_prompt=generation_prompt is not False,
        n=n,
        sampling=sampling,
        **shared,
    )


def _sampling(fields: Fields, *, logprobs: Any, max_tokens: Any) -> SamplingFields:
    values = {name: fields.raw(name) for name in known.SAMPLING}
    return SamplingFields(logprobs=logprobs, max_tokens=max_tokens, **values)


def _shared(fields: Fields) -> dict[str, Any]:
    for key, read in known.WITHOUT_EFFECT.items():
        read(fields, key)
    _refuse_structured(fields)
    stream = fields.boolean("stream") or False
    return {
        "model": fields.string("model"),
        "stop": fields.raw("stop"),
        "stream": stream,
        "include_usage": _include_usage(fields, stream),
        "skip_special_tokens": fields.boolean("skip_special_tokens"),
        "include_stop_str_in_output": fields.boolean("include_stop_str_in_output"),
        "priority": fields.integer("priority"),
    }


def _choices(fields: Fields) -> int:
    n = fields.integer("n")
    if n is not None and n < 1:
        raise RequestError(f"n must be at least 1, not {n}", param="n")
    return n or 1


def _chat_logprobs(fields: Fields) -> int | None:
    wanted = fields.boolean("logprobs") or False
    top = fields.integer("top_logprobs")
    if top is None:
        return 0 if wanted else None
    if not wanted:
        raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs")
    if not 0 <= top <= MAX_LOGPROBS:
        message = f"top_logprobs must be from 0 to {MAX_LOGPROBS}, not {top}"
        raise RequestError(message, param="top_logprobs")
    return top


def _chat_max_tokens(fields: Fields) -> int | None:
    older = fields.integer("max_tokens")
    newer = fields.integer("max_completion_tokens")
    if newer is None:
        return older
    if older not in (None, newer):
        message = "max_tokens is the older name of max_completion_tokens; give one of them"
        raise RequestError(message, param="max_tokens")
    if newer < 1:
        message = f"max_completion_tokens must be at least 1, not {newer}"
        raise RequestError(message, param="max_completion_tokens")
    return newer


def _include_usage(fields: Fields, stream: bool) -> bool:
    given = fields.mapping("stream_options")
    if given is None:
        return False
    if not stream:
        raise RequestError("stream_options needs stream: true", param="stream_options")
    options = Fields(given, "stream_options")
    include = options.boolean("include_usage") or False
    unsupported = {"include_obfuscation": (False,), "continuous_usage_stats": (False,)}
    options.finish(unsupported, ("include_usage",))
    return include


def _refuse_structured(fields: Fields) -> None:
    given = fields.mapping("response_format")
    if given is None or given == {"type": "text"}:
        return
    message = "response_format: only {'type': 'text'} is served; JSON mode is not supported yet"
    raise RequestError(message, param="response_format")


def _prompts(fields: Fields, most: int | None) -> tuple[str | tuple[int, ...], ...]:
    value = fields.raw("prompt")
    if value is None:
        raise RequestError("prompt is missing: give text or token ids", param="prompt")
    if type(value) is str:
        return (value,)
    if type(value) is list:
        if not value:
            raise RequestError("prompt must not be empty", param="prompt")
        kinds = set(map(type, value))
        if kinds == {int}:
            return (tuple(value),)
        if most is not None and len(value) > most:
            message = f"prompt: at most {most} prompts, not {len(value)}"
            raise RequestError(message, param="prompt")
        if kinds == {str}:
            return tuple(value)
        if kinds == {list}:
            return tuple(_token_ids(item, f"prompt[{i}]") for i, item in enumerate(value))
    expected = "a string, a list of strings, a list of token ids or a list of such lists"
    raise wrong_type("prompt", expected, value)


def _token_ids(value: list[Any], name: str) -> tuple[int, ...]:
    if value and set(map(type, value)) != {int}:
        index = next(i for i, item in enumerate(value) if type(item) is not int)
        raise wrong_type(f"{name}[{index}]", "a token id", value[index])
    return tuple(value)
