"""Bodies of the Ollama API → frozen requests; values are checked by the request plane."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jserve.core.errors import RequestError
from jserve.gateway.conversation import Conversation
from jserve.gateway.http.chat_fields import read_thinking
from jserve.gateway.http.fields import Fields, wrong_type
from jserve.gateway.http.ollama.messages import read_messages
from jserve.gateway.http.ollama.options import read_options
from jserve.gateway.tools.check import check_num_tools, check_tools
from jserve.gateway.tools.format import Tool
from jserve.grammar.source import GrammarKind, GrammarSource

# Fields that are not served, with the values that ask for nothing; null always does.
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "logprobs": (False,),
    "top_logprobs": (0,),
}
_UNSUPPORTED_GENERATE: dict[str, tuple[object, ...]] = _UNSUPPORTED | {
    "suffix": ("",),
    "template": ("",),
    "context": ([],),
    "images": ([],),
    "width": (0,),
    "height": (0,),
    "steps": (0,),
}
_SHARED_FIELDS = ("model", "stream", "options", "format", "keep_alive", "think")
_CHAT_FIELDS = (*_SHARED_FIELDS, "messages", "tools")
_GENERATE_FIELDS = (*_SHARED_FIELDS, "prompt", "system", "raw")
_SHOW_FIELDS = ("model", "name", "verbose")


@dataclass(frozen=True, slots=True, kw_only=True)
class OllamaRequest:
    """A request to generate, or without text only to load the model or to unload it."""

    model: str
    conversation: Conversation  # its messages are empty where there is no text
    prompt: str = ""  # of generate alone
    raw: bool = False  # the prompt is the whole text that the model reads
    stream: bool
    unloads: bool  # keep_alive is 0
    ignored: tuple[str, ...]  # names of unknown fields, where those are not refused


@dataclass(frozen=True, slots=True, kw_only=True)
class ShowRequest:
    model: str
    ignored: tuple[str, ...]


def parse_ollama_chat(
    body: Mapping[str, Any], *, max_messages: int, ignore_unknown: bool = False
) -> OllamaRequest:
    """Reads the body of `POST /api/chat`.

    Raises RequestError if a field has the wrong type, is not supported, or is unknown without
    `ignore_unknown`.
    """
    ignored: list[str] = []
    fields = Fields(body, ignored=ignored if ignore_unknown else None)
    given = fields.array("messages") or []
    messages = read_messages(given, most=max_messages, ignored=fields.ignored)
    tools = _tools(fields)
    shared, settings = _shared(fields)
    fields.finish(_UNSUPPORTED, _CHAT_FIELDS)
    conversation = Conversation(messages=messages, tools=tools, **settings)
    return OllamaRequest(conversation=conversation, ignored=tuple(ignored), **shared)


def parse_ollama_generate(
    body: Mapping[str, Any], *, ignore_unknown: bool = False
) -> OllamaRequest:
    """Reads the body of `POST /api/generate`; errors are those of `parse_ollama_chat`."""
    ignored: list[str] = []
    fields = Fields(body, ignored=ignored if ignore_unknown else None)
    prompt, system = fields.string("prompt") or "", fields.string("system") or ""
    raw = fields.boolean("raw") or False
    if raw and system:
        raise RequestError("system goes into a template, and raw: true uses none", param="system")
    messages = [{"role": "system", "content": system}] * bool(prompt and system)
    messages += [{"role": "user", "content": prompt}] * bool(prompt)
    shared, settings = _shared(fields)
    fields.finish(_UNSUPPORTED_GENERATE, _GENERATE_FIELDS)
    return OllamaRequest(
        conversation=Conversation(messages=messages, **settings),
        prompt=prompt,
        raw=raw,
        ignored=tuple(ignored),
        **shared,
    )


def parse_show(body: Mapping[str, Any], *, ignore_unknown: bool = False) -> ShowRequest:
    """Reads the body of `POST /api/show`; errors are those of `parse_ollama_chat`."""
    ignored: list[str] = []
    fields = Fields(body, ignored=ignored if ignore_unknown else None)
    older = fields.string("name")
    model = fields.string("model") or older
    fields.boolean("verbose")
    fields.finish({}, _SHOW_FIELDS)
    return ShowRequest(model=_required_model(model), ignored=tuple(ignored))


def _required_model(name: str | None) -> str:
    if not name:
        raise RequestError("model is missing; /api/tags lists the names", param="model")
    return name


def _shared(fields: Fields) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads the fields of both routes, as those of a request and of its conversation."""
    keep_alive = fields.raw("keep_alive")
    if keep_alive is not None and not isinstance(keep_alive, str | int | float):
        raise wrong_type("keep_alive", "a duration", keep_alive)
    budget, variables = _think(fields)
    given = fields.mapping("options") or {}
    sampling, stop, most = read_options(Fields(given, "options", fields.ignored))
    settings = {
        "structured": _format(fields),
        "max_reasoning_tokens": budget,
        "variables": variables,
        "sampling": sampling,
        "stop": stop,
        "default_max_tokens": most,
    }
    shared = {
        "model": _required_model(fields.string("model")),
        "stream": fields.boolean("stream") is not False,
        "unloads": keep_alive in (0, "0", "0s", "0m"),
    }
    return shared, settings


def _think(fields: Fields) -> tuple[int | None, dict[str, Any]]:
    """Reads the budget of reasoning, and variables for the template."""
    value = fields.raw("think")
    match value:
        case None | True | False:
            return read_thinking(None, enabled=value)
        case "low" | "medium" | "high":
            return read_thinking(value, enabled=True)
    raise wrong_type("think", "true, false, low, medium or high", value)


def _format(fields: Fields) -> GrammarSource | None:
    value = fields.raw("format")
    match value:
        case None | "":
            return None
        case "json":
            return GrammarSource(kind=GrammarKind.JSON_OBJECT, value=True, field="format")
        case dict():
            return GrammarSource(kind=GrammarKind.JSON, value=value, field="format")
    raise wrong_type("format", "json or a JSON schema", value)


def _tools(fields: Fields) -> tuple[Tool, ...]:
    values = fields.array("tools") or []
    check_num_tools(len(values))
    tools = [_tool(f"tools[{i}]", value, fields.ignored) for i, value in enumerate(values)]
    return check_tools(tools, name_field="function.name")


def _tool(where: str, value: Any, ignored: list[str] | None) -> Tool:
    if not isinstance(value, dict):
        raise wrong_type(where, "an object", value)
    tool = Fields(value, where, ignored)
    kind, given = tool.string("type"), tool.mapping("function")
    tool.finish({}, ("type", "function"))
    if kind not in (None, "function") or given is None:
        raise RequestError(f"{where} must be of type function, with a function", param=where)
    function = Fields(given, f"{where}.function", ignored)
    name, description = function.string("name"), function.string("description")
    parameters, strict = function.mapping("parameters"), function.boolean("strict")
    function.finish({}, ("name", "description", "parameters", "strict"))
    if not name:
        path = f"{where}.function.name"
        raise RequestError(f"{path} is missing", param=path)
    return Tool(name, description or "", parameters or {}, strict or False)
