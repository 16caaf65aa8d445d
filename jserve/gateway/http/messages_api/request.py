"""Bodies of `POST /v1/messages` and of its count of tokens → frozen requests."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jserve.core.errors import RequestError
from jserve.gateway.conversation import Conversation
from jserve.gateway.http.chat_fields import read_thinking
from jserve.gateway.http.fields import Fields, as_integer
from jserve.gateway.http.messages_api.content import read_messages, system_text
from jserve.gateway.tools.check import check_choice, check_num_tools, check_tools
from jserve.gateway.tools.format import AUTO, ChoiceMode, Tool, ToolChoice
from jserve.gateway.validation import SamplingFields
from jserve.grammar.source import GrammarKind, GrammarSource

# Fields accepted without effect, with any value of their type: they cannot change an answer here.
_WITHOUT_EFFECT = {
    "metadata": Fields.mapping,
    "service_tier": Fields.string,
    "inference_geo": Fields.string,
    "speed": Fields.string,
    "cache_control": Fields.mapping,
    "user_profile_id": Fields.string,
    "workspace_id": Fields.string,
}
# Fields that are not served, with the values that ask for nothing; null always does.
_UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "billing_policy": (),
    "compaction": (),
    "container": (),
    "context_management": ({}, {"edits": []}),
    "diagnostics": (),
    "fallback_credit_token": (),
    "fallbacks": ([],),
    "mcp_servers": ([],),
    "thread": (),
}
_FIELDS = (
    *("model", "messages", "max_tokens", "system", "stream", "stop_sequences", "temperature"),
    *("top_k", "top_p", "tools", "tool_choice", "thinking", "output_config", "output_format"),
    *_WITHOUT_EFFECT,
)
_UNSUPPORTED_TOOL: dict[str, tuple[object, ...]] = {
    "allowed_callers": (["direct"], []),
    "defer_loading": (False,),
    "input_examples": ([],),
}
_TOOL_FIELDS = ("type", "name", "description", "input_schema", "strict", "cache_control")


@dataclass(frozen=True, slots=True, kw_only=True)
class MessagesRequest:
    model: str | None
    conversation: Conversation
    max_tokens: int  # the context may hold fewer; the answer says so
    stream: bool
    single_call: bool  # the answer ends after its first call
    omits_thinking: bool  # blocks of thinking have no text
    ignored: tuple[str, ...]  # names of unknown fields, where those are not refused


def parse_messages(
    body: Mapping[str, Any], *, max_messages: int, ignore_unknown: bool = False
) -> MessagesRequest:
    """Reads the body of `POST /v1/messages`.

    Raises RequestError if a field has the wrong type, is not supported, or is unknown without
    `ignore_unknown`.
    """
    if body.get("max_tokens") is None:
        raise RequestError("max_tokens is missing; give the most to generate", param="max_tokens")
    return _parse(body, max_messages, ignore_unknown)


def parse_count(
    body: Mapping[str, Any], *, max_messages: int, ignore_unknown: bool = False
) -> MessagesRequest:
    """Reads the body of `POST /v1/messages/count_tokens`; errors are those of `parse_messages`."""
    return _parse({**body, "max_tokens": 1}, max_messages, ignore_unknown)


def _parse(body: Mapping[str, Any], max_messages: int, ignore_unknown: bool) -> MessagesRequest:
    ignored: list[str] = []
    fields = Fields(body, ignored=ignored if ignore_unknown else None)
    for key, read in _WITHOUT_EFFECT.items():
        read(fields, key)
    max_tokens = fields.integer("max_tokens") or 0
    if max_tokens < 1:
        raise RequestError("max_tokens must be at least 1", param="max_tokens")
    system = system_text(fields)
    messages, continues = read_messages(
        fields.raw("messages"), system, most=max_messages, ignored=fields.ignored
    )
    enabled, most, omits = _thinking(fields)
    effort, structured = _output(fields)
    budget, variables = read_thinking(effort, enabled=enabled)
    choice, single = _choice(fields)
    tools = _tools(fields)
    check_choice(choice, tools, empty_field="tools")
    conversation = Conversation(
        messages=messages,
        tools=tools,
        tool_choice=choice,
        parallel_tool_calls=not single,
        structured=structured,
        max_reasoning_tokens=most if budget is None else budget,
        sampling=SamplingFields(
            temperature=fields.raw("temperature"),
            top_k=as_integer(fields.raw("top_k")),
            top_p=fields.raw("top_p"),
        ),
        stop=fields.strings("stop_sequences"),
        default_max_tokens=max_tokens,  # as a default, so that the context bounds it
        continue_final_message=continues,
        variables=variables,
    )
    model, stream = fields.string("model"), fields.boolean("stream") or False
    fields.finish(_UNSUPPORTED, _FIELDS)
    return MessagesRequest(
        model=model,
        conversation=conversation,
        max_tokens=max_tokens,
        stream=stream,
        single_call=single,
        omits_thinking=omits,
        ignored=tuple(ignored),
    )


def _thinking(fields: Fields) -> tuple[bool | None, int | None, bool]:
    """Reads whether to think, the budget, and whether the text of thinking is omitted."""
    given = fields.mapping("thinking")
    if given is None:
        return None, None, False
    thinking = Fields(given, "thinking", fields.ignored)
    kind, display = thinking.string("type"), thinking.string("display")
    budget = thinking.integer("budget_tokens")
    thinking.finish({}, ("type", "budget_tokens", "display"))
    if display not in (None, "summarized", "omitted"):
        message = "thinking.display must be summarized or omitted"
        raise RequestError(message, param="thinking.display")
    omits = display == "omitted"
    match kind:
        case "disabled":
            return False, None, omits
        case "adaptive":
            return True, None, omits
        case "enabled":
            if budget is None or budget < 1:
                message = "thinking.budget_tokens must be the number of tokens, at least 1"
                raise RequestError(message, param="thinking.budget_tokens")
            return True, budget, omits
    message = f"thinking.type {str(kind)[:40]!r} is not supported; enabled, disabled, adaptive are"
    raise RequestError(message, param="thinking.type")


def _output(fields: Fields) -> tuple[str | None, GrammarSource | None]:
    """Reads the effort and the schema of the answer, which has an older name of its own."""
    older = fields.mapping("output_format")
    given = fields.mapping("output_config")
    effort = None
    schemas = [] if older is None else [_schema(Fields(older, "output_format", fields.ignored))]
    if given is not None:
        output = Fields(given, "output_config", fields.ignored)
        effort, form = output.string("effort"), output.mapping("format")
        output.finish({"task_budget": ()}, ("effort", "format"))
        if form is not None:
            schemas.append(_schema(Fields(form, "output_config.format", fields.ignored)))
    if len(schemas) > 1:
        message = "output_format and output_config.format bind the answer twice; send one of them"
        raise RequestError(message, param="output_format")
    return effort, schemas[0] if schemas else None


def _schema(fields: Fields) -> GrammarSource:
    kind, schema = fields.string("type"), fields.mapping("schema")
    fields.finish({"name": ()}, ("type", "schema"))
    if kind != "json_schema" or schema is None:
        path = fields.name("type")
        raise RequestError(f"{path} must be json_schema, with a schema", param=path)
    return GrammarSource(kind=GrammarKind.JSON, value=schema, field=fields.name("schema"))


def _choice(fields: Fields) -> tuple[ToolChoice, bool]:
    """Reads whether calls must come, and whether at most one may."""
    given = fields.mapping("tool_choice")
    if given is None:
        return AUTO, False
    choice = Fields(given, "tool_choice", fields.ignored)
    kind, name = choice.string("type"), choice.string("name")
    single = choice.boolean("disable_parallel_tool_use") or False
    choice.finish({}, ("type", "name", "disable_parallel_tool_use"))
    match kind:
        case "auto":
            return AUTO, single
        case "none":
            return ToolChoice(ChoiceMode.NONE), single
        case "any":
            return ToolChoice(ChoiceMode.REQUIRED), single
        case "tool" if name:
            return ToolChoice(ChoiceMode.NAMED, name), single
    message = "tool_choice.type must be auto, any, none, or tool with a name"
    raise RequestError(message, param="tool_choice.type")


def _tools(fields: Fields) -> tuple[Tool, ...]:
    values = fields.array("tools") or []
    check_num_tools(len(values))
    tools = [_tool(f"tools[{i}]", value, fields.ignored) for i, value in enumerate(values)]
    return check_tools(tools, name_field="name")


def _tool(where: str, value: Any, ignored: list[str] | None) -> Tool:
    if not isinstance(value, dict):
        raise RequestError(f"{where} must be an object", param=where)
    fields = Fields(value, where, ignored)
    kind = fields.string("type")
    if kind not in (None, "custom"):
        message = f"{where}.type {kind[:60]!r}: tools that the server runs are not supported"
        raise RequestError(message, param=f"{where}.type")
    name, schema = fields.string("name"), fields.mapping("input_schema")
    description, strict = fields.string("description"), fields.boolean("strict")
    fields.mapping("cache_control")
    fields.boolean("eager_input_streaming")  # every input is streamed as it comes
    fields.finish(_UNSUPPORTED_TOOL, _TOOL_FIELDS)
    if not name or schema is None:
        missing = "input_schema" if name else "name"
        raise RequestError(f"{where}.{missing} is missing", param=f"{where}.{missing}")
    return Tool(name, description or "", schema, strict or False)
