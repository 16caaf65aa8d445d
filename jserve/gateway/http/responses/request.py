"""The body of `POST /v1/responses` → a frozen request: types and forms are checked here."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from dataclasses import fields as dataclass_fields
from typing import Any

import orjson

from jserve.core.errors import RequestError
from jserve.core.request import MAX_LOGPROBS
from jserve.gateway.http.fields import Fields, as_integer, wrong_type
from jserve.gateway.http.openai_request import template_variables
from jserve.gateway.http.responses.items import Item, read_input
from jserve.gateway.http.responses.tools import Tools, read_tools
from jserve.gateway.structured import read_structured
from jserve.gateway.validation import SamplingFields
from jserve.grammar.source import MAX_SOURCE_BYTES, GrammarKind, GrammarSource

_LOGPROBS = "message.output_text.logprobs"
_MAX_METADATA = 16
# Fields of any JSON, whose size is bounded: they are handled on the event loop.
_BOUNDED = ("tools", "tool_choice", "text", "structured_outputs", "chat_template_kwargs")
_MAX_KEY_CHARS, _MAX_VALUE_CHARS = 64, 512

# Fields that go to `SamplingFields` under their own names and are checked there.
_SAMPLING = tuple(
    it.name for it in dataclass_fields(SamplingFields) if it.name not in ("logprobs", "max_tokens")
)
# Labels that the response repeats, and hints; none can change the output.
_REPEATED = {
    "user": Fields.string,
    "safety_identifier": Fields.string,
    "prompt_cache_key": Fields.string,
    "prompt_cache_retention": Fields.string,
    "max_tool_calls": Fields.integer,  # of tools that the server calls
}
_WITHOUT_EFFECT = {
    "prompt_cache_options": Fields.mapping,
    "service_tier": Fields.string,
    "request_id": Fields.string,  # the header X-Request-Id names a request
}
# Fields of the API that are not served, with the values that ask for nothing; null always does.
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "access_programs": (),
    "background_options": ({},),
    "context_management": ([],),
    "conversation": (),
    "image": (),
    "moderation": (),
    "n": (1,),
    "prompt": (),
}
_FIELDS = (
    *_SAMPLING,
    *_REPEATED,
    *_WITHOUT_EFFECT,
    *("model", "input", "instructions", "previous_response_id", "store", "background", "stream"),
    *("stream_options", "tools", "tool_choice", "parallel_tool_calls", "text", "reasoning"),
    *("max_output_tokens", "include", "top_logprobs", "metadata", "truncation", "stop"),
    *("priority", "cache_salt", "skip_special_tokens", "chat_template_kwargs", "reasoning_effort"),
    "structured_outputs",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseRequest:
    """None is unset: the model's default applies."""

    model: str | None
    input: tuple[Item, ...]
    instructions: str | None
    previous_response_id: str | None
    store: bool
    background: bool
    stream: bool
    tools: Tools
    parallel_tool_calls: bool
    structured: GrammarSource | None
    max_reasoning_tokens: int | None
    variables: dict[str, Any]  # of the chat template
    max_output_tokens: int | None
    sampling: SamplingFields
    stop: Any  # unchecked; `validation.check_stop` does it
    priority: int | None
    skip_special_tokens: bool | None
    cache_salt: Any = field(repr=False)  # unchecked; `cache_salts.given_salt` does it
    repeated: dict[str, Any]  # fields of the response that are the request's
    ignored: tuple[str, ...]  # names of unknown fields, where those are not refused


def parse_response(
    body: Mapping[str, Any], *, max_items: int, ignore_unknown: bool = False
) -> ResponseRequest:
    """Reads a body.

    Raises:
        RequestError: a field has the wrong type or form, is not supported, or is unknown without
            `ignore_unknown`.
    """
    _check_sizes(body)
    ignored: list[str] = []
    fields = Fields(body, ignored=ignored if ignore_unknown else None)
    repeated = _repeated(fields)
    stream = fields.boolean("stream") or False
    _without_effect(fields, stream)
    structured = _structured(fields, repeated["text"]["format"])
    budget, variables = template_variables(fields, repeated["reasoning"]["effort"])
    logprobs = _logprobs(fields, repeated["top_logprobs"])
    parsed: dict[str, Any] = {
        "model": fields.string("model"),
        "input": read_input(fields.raw("input"), most=max_items, ignored=fields.ignored),
        "tools": read_tools(repeated["tools"], repeated["tool_choice"], ignored=fields.ignored),
        "sampling": _sampling(fields, logprobs),
        "stop": fields.raw("stop"),
        "priority": fields.integer("priority"),
        "skip_special_tokens": fields.boolean("skip_special_tokens"),
        "cache_salt": fields.raw("cache_salt"),
    }
    store = fields.boolean("store") is not False
    background = fields.boolean("background") or False
    _check_background(background, store=store, stream=stream)
    fields.finish(_UNSUPPORTED, _FIELDS)
    return ResponseRequest(
        instructions=repeated["instructions"],
        previous_response_id=repeated["previous_response_id"],
        store=store,
        background=background,
        stream=stream,
        parallel_tool_calls=repeated["parallel_tool_calls"],
        structured=structured,
        max_reasoning_tokens=budget,
        variables=variables,
        max_output_tokens=repeated["max_output_tokens"],
        repeated={**repeated, "store": store, "background": background},
        ignored=tuple(ignored),
        **parsed,
    )


def _check_sizes(body: Mapping[str, Any]) -> None:
    for name in _BOUNDED:
        if name in body and (size := len(orjson.dumps(body[name]))) > MAX_SOURCE_BYTES:
            message = f"{name} has {size} bytes as JSON; at most {MAX_SOURCE_BYTES}"
            raise RequestError(message, param=name)


def _repeated(fields: Fields) -> dict[str, Any]:
    """Reads the fields that the response repeats, in its form."""
    repeated: dict[str, Any] = {key: read(fields, key) for key, read in _REPEATED.items()}
    max_output_tokens = fields.integer("max_output_tokens")
    if max_output_tokens is not None and max_output_tokens < 1:
        message = f"max_output_tokens must be at least 1, not {max_output_tokens}"
        raise RequestError(message, param="max_output_tokens")
    truncation = fields.string("truncation") or "disabled"
    if truncation not in ("auto", "disabled"):
        message = f"truncation must be auto or disabled, not {truncation[:40]!r}"
        raise RequestError(message, param="truncation")
    tool_choice, parallel = fields.raw("tool_choice"), fields.boolean("parallel_tool_calls")
    return repeated | {
        "instructions": fields.string("instructions"),
        "previous_response_id": fields.string("previous_response_id"),
        "max_output_tokens": max_output_tokens,
        "metadata": _metadata(fields),
        "truncation": truncation,
        "tools": fields.array("tools") or [],
        "tool_choice": "auto" if tool_choice is None else tool_choice,
        "parallel_tool_calls": parallel is not False,
        "text": _text(fields),
        "reasoning": _reasoning(fields),
        "top_logprobs": _top_logprobs(fields),
        "service_tier": "default",
    }


def _metadata(fields: Fields) -> dict[str, str]:
    metadata = fields.mapping("metadata") or {}
    if len(metadata) > _MAX_METADATA:
        message = f"metadata has {len(metadata)} pairs; at most {_MAX_METADATA}"
        raise RequestError(message, param="metadata")
    for key, value in metadata.items():
        name = f"metadata.{key[:_MAX_KEY_CHARS]}"
        if not isinstance(value, str):
            raise wrong_type(name, "a string", value)
        if len(key) > _MAX_KEY_CHARS or len(value) > _MAX_VALUE_CHARS:
            message = (
                f"{name}: keys have at most {_MAX_KEY_CHARS} characters, values {_MAX_VALUE_CHARS}"
            )
            raise RequestError(message, param="metadata")
    return metadata


def _text(fields: Fields) -> dict[str, Any]:
    text = Fields(fields.mapping("text") or {}, "text", fields.ignored)
    form = text.mapping("format") or {"type": "text"}
    verbosity = text.string("verbosity")
    text.finish({}, ("format", "verbosity"))
    return {"format": form} if verbosity is None else {"format": form, "verbosity": verbosity}


def _reasoning(fields: Fields) -> dict[str, Any]:
    reasoning = Fields(fields.mapping("reasoning") or {}, "reasoning", fields.ignored)
    effort = reasoning.string("effort")
    # The reasoning itself is in the response, so that a summary would add nothing.
    older = reasoning.string("generate_summary")
    summary = reasoning.string("summary") or older
    reasoning.finish(
        {"context": ("auto",), "mode": ("standard",)}, ("effort", "summary", "generate_summary")
    )
    return {"effort": effort, "summary": summary}


def _top_logprobs(fields: Fields) -> int:
    top = fields.integer("top_logprobs")
    if top is not None and not 0 <= top <= MAX_LOGPROBS:
        message = f"top_logprobs must be from 0 to {MAX_LOGPROBS}, not {top}"
        raise RequestError(message, param="top_logprobs")
    return top or 0


def _structured(fields: Fields, form: dict[str, Any]) -> GrammarSource | None:
    """Reads what binds the answer's text: `text.format`, or vLLM's structured_outputs."""
    other = read_structured({"structured_outputs": fields.raw("structured_outputs")})
    source = _format(form)
    if source is not None and other is not None:
        message = f"{source.field} and {other.field} bind the answer twice; send one of them"
        raise RequestError(message, param=other.field)
    return source or other


def _format(form: dict[str, Any]) -> GrammarSource | None:
    name = "text.format"
    match form.get("type"):
        case "text":
            return None
        case "json_object":
            return GrammarSource(kind=GrammarKind.JSON_OBJECT, value=True, field=name)
        case "json_schema":
            fields = Fields(form, name)
            schema = fields.raw("schema")
            for key in ("type", "name", "description"):
                fields.string(key)
            fields.boolean("strict")  # or not: the answer follows the schema
            fields.finish({}, ("type", "name", "description", "strict", "schema"))
            if schema is None:
                raise RequestError(f"{name}.schema is missing", param=f"{name}.schema")
            return GrammarSource(kind=GrammarKind.JSON, value=schema, field=f"{name}.schema")
    message = (
        f"{name}.type {str(form.get('type'))[:40]!r} is not supported; text, json_object and "
        "json_schema are"
    )
    raise RequestError(message, param=f"{name}.type")


def _logprobs(fields: Fields, top: int) -> int | None:
    """Returns the number of alternatives per token; None if there are no log-probabilities.

    Names in `include` that this server never has something for are hints.
    """
    include = fields.strings("include") or ()
    return top if top or _LOGPROBS in include else None


def _sampling(fields: Fields, logprobs: int | None) -> SamplingFields:
    values = {name: as_integer(fields.raw(name)) for name in _SAMPLING}
    return SamplingFields(**values, logprobs=logprobs)


def _without_effect(fields: Fields, stream: bool) -> None:
    for key, read in _WITHOUT_EFFECT.items():
        read(fields, key)
    given = fields.mapping("stream_options")
    if given is not None and not stream:
        raise RequestError("stream_options needs stream: true", param="stream_options")
    options = Fields(given or {}, "stream_options", fields.ignored)
    options.boolean("include_obfuscation")  # padding against eavesdroppers; it is never added
    options.finish({}, ("include_obfuscation",))


def _check_background(background: bool, *, store: bool, stream: bool) -> None:
    if background and not store:
        message = "background needs store: true, or nobody could fetch the response"
        raise RequestError(message, param="background")
    if background and stream:
        message = "background: not supported yet with stream: true; send one of them"
        raise RequestError(message, param="background")
