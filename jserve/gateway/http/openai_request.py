"""OpenAI request bodies → frozen requests: types are checked here, values by the request plane.

What is honoured, accepted without effect or refused is listed in `openai_fields`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from jserve.core.errors import RequestError
from jserve.core.request import MAX_LOGPROBS
from jserve.gateway.http import openai_fields as known
from jserve.gateway.http.chat_fields import read_thinking
from jserve.gateway.http.fields import Fields, as_integer, wrong_type
from jserve.gateway.http.openai_tools import AskedTools, read_tools
from jserve.gateway.messages import checked_variables
from jserve.gateway.prompts import WHOLE_CONTEXT, Truncation
from jserve.gateway.structured import STRUCTURED_FIELDS, read_structured
from jserve.gateway.validation import SamplingFields
from jserve.grammar.source import GrammarSource

_NO_LIMIT = -1  # of max_tokens, as llama.cpp and LM Studio have it


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenAIRequest:
    """Fields that both generating routes share. None is unset: the model's default applies."""

    model: str | None
    sampling: SamplingFields
    stop: Any  # unchecked; `validation.check_stop` does it
    unlimited: bool  # max_tokens was -1: the rest of the context
    n: int
    stream: bool
    include_usage: bool
    continuous_usage: bool  # every chunk of a stream says how many tokens there are so far
    skip_special_tokens: bool | None
    include_stop_str_in_output: bool | None
    priority: int | None
    structured: GrammarSource | None  # a form that is right; `RequestPlane.constraint` checks it
    cache_salt: Any = field(repr=False)  # unchecked; `cache_salts.given_salt` does it
    echo: bool
    bad_words: tuple[str, ...]  # unchecked; `RequestPlane.with_bad_words` does it
    truncation: Truncation | None  # `PromptMaker.bounded` checks it
    return_token_ids: bool
    tokens_as_ids: bool  # log-probabilities name tokens by their ids
    ignored: tuple[str, ...]  # names of unknown fields, where those are not refused


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionRequest(OpenAIRequest):
    prompts: tuple[str | tuple[int, ...], ...]  # not empty; each text or token ids
    best_of: int  # choices that are generated; the best `n` are answered
    add_special_tokens: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest(OpenAIRequest):
    messages: Any  # unchecked; `messages.check_messages` does it
    tools: AskedTools
    include_reasoning: bool
    max_reasoning_tokens: int | None
    add_generation_prompt: bool
    continue_final_message: bool
    template_variables: dict[str, Any]
    documents: list[Any] | None
    chat_template: str | None


def parse_completion(
    body: Mapping[str, Any], *, max_prompts: int | None = None, ignore_unknown: bool = False
) -> CompletionRequest:
    """Reads the body of `POST /v1/completions`. More prompts are refused before they are read.

    Raises:
        RequestError: a field has the wrong type, is not supported, or is unknown without
            `ignore_unknown`.
    """
    ignored: list[str] = []
    fields = Fields(body, ignored=ignored if ignore_unknown else None)
    prompts = _prompts(fields, max_prompts)
    n = _choices(fields)
    best_of = fields.integer("best_of")
    if best_of is None:
        best_of = n
    if best_of < n:
        raise RequestError(f"best_of is {best_of}, which is less than n = {n}", param="best_of")
    if fields.string("suffix"):
        message = "suffix is not supported: text is continued at its end, never filled in"
        raise RequestError(message, param="suffix")
    logprobs = fields.raw("logprobs")
    limits = _sampling(fields, logprobs=logprobs, max_tokens=fields.raw("max_tokens"))
    shared = _shared(fields)
    if best_of > n and shared["stream"]:
        message = "best_of with stream: the best choices are known at the end; leave one out"
        raise RequestError(message, param="best_of")
    special = fields.boolean("add_special_tokens")
    fields.finish(known.UNSUPPORTED_COMPLETION, known.COMPLETION_FIELDS)
    return CompletionRequest(
        prompts=prompts,
        best_of=best_of,
        add_special_tokens=special,
        n=n,
        ignored=tuple(ignored),
        **limits,
        **shared,
    )


def parse_chat(body: Mapping[str, Any], *, ignore_unknown: bool = False) -> ChatRequest:
    """Reads the body of `POST /v1/chat/completions`; errors are those of `parse_completion`."""
    ignored: list[str] = []
    fields = Fields(body, ignored=ignored if ignore_unknown else None)
    generation_prompt, continues = generation_prompt_fields(fields)
    logprobs, max_tokens = _chat_logprobs(fields), _chat_max_tokens(fields)
    limits = _sampling(fields, logprobs=logprobs, max_tokens=max_tokens)
    n = _choices(fields)
    shared = _shared(fields)
    messages = fields.raw("messages")
    budget, variables = template_variables(fields)
    given_budget = _reasoning_budget(fields)
    asked = ChatRequest(
        messages=messages,
        tools=read_tools(fields),
        include_reasoning=fields.boolean("include_reasoning") is not False,
        max_reasoning_tokens=budget if given_budget is None else given_budget,
        add_generation_prompt=generation_prompt,
        continue_final_message=continues,
        template_variables=variables,
        documents=_documents(fields),
        chat_template=fields.string("chat_template"),
        n=n,
        ignored=(),
        **limits,
        **shared,
    )
    fields.finish(known.UNSUPPORTED_CHAT, known.CHAT_FIELDS)
    return replace(asked, ignored=tuple(ignored))


def generation_prompt_fields(fields: Fields) -> tuple[bool, bool]:
    """Reads whether the prompt opens an answer, and whether it ends with the last message."""
    generation_prompt = fields.boolean("add_generation_prompt")
    continues = fields.boolean("continue_final_message") or False
    if continues and generation_prompt:
        name = "continue_final_message"
        raise RequestError(f"{name} and add_generation_prompt exclude each other", param=name)
    return generation_prompt is not False and not continues, continues


def _reasoning_budget(fields: Fields) -> int | None:
    budget = fields.integer("thinking_token_budget")
    if budget is not None and budget < 0:
        name = "thinking_token_budget"
        raise RequestError(f"{name} must be at least 0, not {budget}", param=name)
    return budget


def _documents(fields: Fields) -> list[Any] | None:
    documents = fields.raw("documents")
    if documents is None or (isinstance(documents, list) and all(map(_is_object, documents))):
        return documents
    raise wrong_type("documents", "a list of objects", documents)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def template_variables(
    fields: Fields, effort: str | None = None
) -> tuple[int | None, dict[str, Any]]:
    """Reads the budget of reasoning by its effort, and the variables of a chat template.

    `effort` counts unless the field `reasoning_effort` is there.
    """
    name = "chat_template_kwargs"
    variables = checked_variables(name, fields.mapping(name) or {})
    budget, of_effort = read_thinking(fields.string("reasoning_effort") or effort)
    return budget, of_effort | variables


def _sampling(fields: Fields, *, logprobs: Any, max_tokens: Any) -> dict[str, Any]:
    values = {name: fields.raw(name) for name in known.SAMPLING}
    values |= {"logprobs": logprobs, "max_tokens": max_tokens}
    for name in known.INTEGERS:
        values[name] = as_integer(values[name])
    for name in known.INTEGER_LISTS:
        if isinstance(values[name], list):
            values[name] = [as_integer(item) for item in values[name]]
    unlimited = type(values["max_tokens"]) is int and values["max_tokens"] == _NO_LIMIT
    if unlimited:
        values["max_tokens"] = None
    return {"sampling": SamplingFields(**values), "unlimited": unlimited}


def _shared(fields: Fields) -> dict[str, Any]:
    for key, read in known.WITHOUT_EFFECT.items():
        read(fields, key)
    stream = fields.boolean("stream") or False
    include_usage, continuous_usage = _usage(fields, stream)
    return {
        "model": fields.string("model"),
        "stop": fields.raw("stop"),
        "stream": stream,
        "include_usage": include_usage,
        "continuous_usage": continuous_usage,
        "skip_special_tokens": fields.boolean("skip_special_tokens"),
        "include_stop_str_in_output": fields.boolean("include_stop_str_in_output"),
        "priority": fields.integer("priority"),
        "structured": read_structured({name: fields.raw(name) for name in STRUCTURED_FIELDS}),
        "cache_salt": fields.raw("cache_salt"),
        "echo": fields.boolean("echo") or False,
        "bad_words": fields.strings("bad_words") or (),
        "truncation": _truncation(fields),
        "return_token_ids": fields.boolean("return_token_ids") or False,
        "tokens_as_ids": fields.boolean("return_tokens_as_token_ids") or False,
    }


def _truncation(fields: Fields) -> Truncation | None:
    name = "truncate_prompt_tokens"
    length, side = fields.integer(name), fields.string("truncation_side")
    if side not in (None, "left", "right"):
        message = f"truncation_side must be left or right, not {side[:40]!r}"
        raise RequestError(message, param="truncation_side")
    if length is None:
        return None
    if length < 1 and length != WHOLE_CONTEXT:
        message = f"{name} must be at least 1, or {WHOLE_CONTEXT} for the context, not {length}"
        raise RequestError(message, param=name)
    return Truncation(length, keeps_start=side == "right")


def _choices(fields: Fields) -> int:
    n = fields.integer("n")
    if n is not None and n < 1:
        raise RequestError(f"n must be at least 1, not {n}", param="n")
    return n or 1


def _chat_logprobs(fields: Fields) -> int | None:
    wanted = fields.boolean("logprobs") or False
    top = fields.integer("top_logprobs")
    if not wanted and top not in (None, 0):
        raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs")
    if not wanted:
        return None
    if top is not None and not 0 <= top <= MAX_LOGPROBS:
        message = f"top_logprobs must be from 0 to {MAX_LOGPROBS}, not {top}"
        raise RequestError(message, param="top_logprobs")
    return top or 0


def _chat_max_tokens(fields: Fields) -> int | None:
    # max_tokens is the older name; of both the newer counts, as in vLLM.
    older = fields.integer("max_tokens")
    newer = fields.integer("max_completion_tokens")
    if newer is not None and newer < 1 and newer != _NO_LIMIT:
        message = f"max_completion_tokens must be at least 1, not {newer}"
        raise RequestError(message, param="max_completion_tokens")
    return older if newer is None else newer


def _usage(fields: Fields, stream: bool) -> tuple[bool, bool]:
    """Reads whether the last chunk says the usage, and whether every chunk does."""
    given = fields.mapping("stream_options")
    if given is None:
        return False, False
    if not stream:
        raise RequestError("stream_options needs stream: true", param="stream_options")
    options = Fields(given, "stream_options", fields.ignored)
    include = options.boolean("include_usage")
    every = options.boolean("continuous_usage_stats") or False
    options.boolean("include_obfuscation")  # padding against eavesdroppers; it is never added
    options.finish({}, ("include_usage", "continuous_usage_stats", "include_obfuscation"))
    if include is None:  # it is true by default in vLLM
        include = every
    return include, include and every


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
