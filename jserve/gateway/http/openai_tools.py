"""Tools of OpenAI's chat completions, in the newer and the older form."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jserve.core.errors import RequestError
from jserve.gateway.http.fields import Fields, wrong_type
from jserve.gateway.tools.check import check_choice, check_num_tools, check_tools
from jserve.gateway.tools.format import AUTO, ChoiceMode, Tool, ToolChoice

_MODES = {mode.value: mode for mode in ChoiceMode if mode is not ChoiceMode.NAMED}


@dataclass(frozen=True, slots=True)
class AskedTools:
    """What a request says of tools."""

    tools: tuple[Tool, ...] = ()
    choice: ToolChoice = AUTO
    parallel: bool = True


def read_tools(fields: Fields) -> AskedTools:
    """Reads `tools`, `tool_choice`, `parallel_tool_calls`, and `functions` and `function_call`.

    Raises RequestError that names the field, among others for two tools of one name and a choice
    that is not among the tools.
    """
    tools = _tools(fields.raw("tools"))
    choice, allowed = _choice(fields.raw("tool_choice"))
    older, called = fields.raw("functions"), fields.raw("function_call")
    if older:
        if tools:
            raise RequestError("tools and functions are the same; send one", param="functions")
        tools = _functions(older)
    if called is not None:
        choice = _older_choice(called)
    if allowed is not None:
        tools = tuple(tool for tool in tools if tool.name in allowed)
    check_choice(choice, tools, empty_field="tools")
    parallel = fields.boolean("parallel_tool_calls")
    return AskedTools(tools, choice, parallel is not False)


def _tools(value: Any) -> tuple[Tool, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        raise wrong_type("tools", "a list of tools", value)
    check_num_tools(len(value))
    found: list[Tool] = []
    for i, tool in enumerate(value):
        where = f"tools[{i}]"
        if not isinstance(tool, Mapping):
            raise wrong_type(where, "an object", tool)
        if tool.get("type", "function") != "function":
            message = f"{where}.type: only functions are supported, not {str(tool['type'])[:40]!r}"
            raise RequestError(message, param=f"{where}.type")
        found.append(_function(tool.get("function"), f"{where}.function"))
    return check_tools(found, name_field="function.name")


def _functions(value: Any) -> tuple[Tool, ...]:
    if not isinstance(value, list):
        raise wrong_type("functions", "a list of functions", value)
    check_num_tools(len(value), "functions")
    found = [_function(it, f"functions[{i}]") for i, it in enumerate(value)]
    return check_tools(found, name_field="name", field="functions")


def _function(value: Any, where: str) -> Tool:
    if not isinstance(value, Mapping):
        raise wrong_type(where, "an object", value)
    name, description = value.get("name"), value.get("description")
    if not isinstance(name, str):
        raise wrong_type(f"{where}.name", "a string", name)
    if description is not None and not isinstance(description, str):
        raise wrong_type(f"{where}.description", "a string", description)
    parameters, strict = value.get("parameters"), value.get("strict")
    if parameters is not None and not isinstance(parameters, Mapping):
        raise wrong_type(f"{where}.parameters", "a JSON schema", parameters)
    if strict is not None and not isinstance(strict, bool):
        raise wrong_type(f"{where}.strict", "true or false", strict)
    return Tool(name, description or "", dict(parameters or {}), strict or False)


def _choice(value: Any) -> tuple[ToolChoice, set[str] | None]:
    """The choice, and the names of the tools that it is restricted to."""
    if value is None:
        return AUTO, None
    if isinstance(value, str) and value in _MODES:
        return ToolChoice(_MODES[value]), None
    if isinstance(value, Mapping):
        kind, function = value.get("type"), value.get("function")
        name = function.get("name") if isinstance(function, Mapping) else value.get("name")
        if kind == "function" and isinstance(name, str):
            return ToolChoice(ChoiceMode.NAMED, name), None
        allowed = value.get("allowed_tools")
        if kind == "allowed_tools" and isinstance(allowed, Mapping):
            return _allowed(allowed)
    expected = "none, auto, required, or an object that names a function"
    raise wrong_type("tool_choice", expected, value)


def _allowed(value: Mapping[str, Any]) -> tuple[ToolChoice, set[str]]:
    where = "tool_choice.allowed_tools"
    mode, tools = value.get("mode", "auto"), value.get("tools")
    if not isinstance(mode, str) or mode not in ("auto", "required"):
        raise wrong_type(f"{where}.mode", "auto or required", mode)
    if not isinstance(tools, list):
        raise wrong_type(f"{where}.tools", "a list of tools", tools)
    return ToolChoice(_MODES[mode]), {tool.name for tool in map(_named, tools)}


def _named(value: Any) -> Tool:
    function = value.get("function") if isinstance(value, Mapping) else None
    return _function(function, "tool_choice.allowed_tools.tools.function")


def _older_choice(value: Any) -> ToolChoice:
    if isinstance(value, str) and value in ("none", "auto"):
        return ToolChoice(_MODES[value])
    if isinstance(value, Mapping) and isinstance(value.get("name"), str):
        return ToolChoice(ChoiceMode.NAMED, value["name"])
    raise wrong_type("function_call", "none, auto, or an object with a name", value)
