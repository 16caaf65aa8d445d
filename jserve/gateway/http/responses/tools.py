"""Function tools and `tool_choice` as the Responses API has them: flat, without `function`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jserve.core.errors import RequestError
from jserve.gateway.http.fields import Fields, shown, wrong_type
from jserve.gateway.tools.check import check_choice, check_num_tools, check_tools, not_among
from jserve.gateway.tools.format import AUTO, ChoiceMode, Tool, ToolChoice

_CHOICES = {mode.value: mode for mode in ChoiceMode if mode is not ChoiceMode.NAMED}
# Fields of a tool about other callers than the model, with the values that ask for nothing.
_NEUTRAL = {"allowed_callers": (["direct"],), "async": (False,), "defer_loading": (False,)}
_FIELDS = ("type", "name", "description", "parameters", "strict")


@dataclass(frozen=True, slots=True)
class Tools:
    """Tools that may be called, and whether one has to be."""

    tools: tuple[Tool, ...] = ()
    choice: ToolChoice = AUTO


def read_tools(tools: Any, choice: Any, *, ignored: list[str] | None) -> Tools:
    """Reads `tools` and `tool_choice`.

    Raises RequestError for a tool that is no function, for a name twice, and for a choice that is
    not among the tools.
    """
    found = _tools(tools, ignored)
    if choice is None:
        return Tools(found)
    if isinstance(choice, str):
        if choice not in _CHOICES:
            known = ", ".join(_CHOICES)
            message = f"tool_choice must be one of {known} or an object, not {choice[:40]!r}"
            raise RequestError(message, param="tool_choice")
        return _checked(found, ToolChoice(_CHOICES[choice]))
    if not isinstance(choice, dict):
        raise wrong_type("tool_choice", "a string or an object", choice)
    return _object_choice(found, choice)


def _object_choice(tools: Sequence[Tool], choice: Mapping[str, Any]) -> Tools:
    match choice.get("type"):
        case "function":
            name = choice.get("name")
            if not isinstance(name, str):
                raise wrong_type("tool_choice.name", "a string", name)
            return _checked(tools, ToolChoice(ChoiceMode.NAMED, name))
        case "allowed_tools":
            mode = choice.get("mode")
            if mode not in ("auto", "required"):
                message = f"tool_choice.mode must be auto or required, not {shown(mode)}"
                raise RequestError(message, param="tool_choice.mode")
            return _checked(_allowed(tools, choice.get("tools")), ToolChoice(_CHOICES[mode]))
        case kind:
            message = (
                f"tool_choice.type {str(kind)[:40]!r} is not supported; function and "
                "allowed_tools are"
            )
            raise RequestError(message, param="tool_choice.type")


def _allowed(tools: Sequence[Tool], allowed: Any) -> list[Tool]:
    if not isinstance(allowed, list):
        raise wrong_type("tool_choice.tools", "a list", allowed)
    names: set[str] = set()
    for i, tool in enumerate(allowed):
        name = tool.get("name") if isinstance(tool, dict) else None
        if not isinstance(name, str):
            where = f"tool_choice.tools[{i}]"
            raise RequestError(f"{where} must be a function with a name", param=where)
        names.add(name)
    for name in sorted(names - {tool.name for tool in tools}):
        raise not_among(name)
    return [tool for tool in tools if tool.name in names]


def _checked(tools: Sequence[Tool], choice: ToolChoice) -> Tools:
    return Tools(tuple(tools), check_choice(choice, tools, empty_field="tool_choice"))


def _tools(value: Any, ignored: list[str] | None) -> tuple[Tool, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise wrong_type("tools", "a list", value)
    check_num_tools(len(value))
    tools = [_tool(f"tools[{i}]", item, ignored) for i, item in enumerate(value)]
    return check_tools(tools, name_field="name")


def _tool(where: str, value: Any, ignored: list[str] | None) -> Tool:
    if not isinstance(value, dict):
        raise wrong_type(where, "an object", value)
    fields = Fields(value, where, ignored)
    kind = fields.string("type")
    if kind != "function":
        name = f"{where}.type"
        message = f"{name} {str(kind)[:40]!r} is not supported; function tools are"
        raise RequestError(message, param=name)
    name = fields.string("name")
    if not name:
        message = f"{where}.name is missing"
        if "function" in value:
            message += ", beside type: the Responses API has no function object"
        raise RequestError(message, param=f"{where}.name")
    tool = Tool(
        name=name,
        description=fields.string("description") or "",
        parameters=fields.mapping("parameters") or {},
        strict=fields.boolean("strict") or False,
    )
    fields.mapping("output_schema")  # a label: the model is not told of it
    fields.finish(_NEUTRAL, _FIELDS)
    return tool
