"""Rules for the tools of a request and the choice among them, the same in every API."""

import re
from collections.abc import Sequence

from jserve.core.errors import RequestError
from jserve.gateway.tools.format import ChoiceMode, Schema, Tool, ToolChoice

MAX_TOOLS = 512
_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")


def check_tools(
    tools: Sequence[Tool], *, name_field: str, field: str = "tools"
) -> tuple[Tool, ...]:
    """Returns the tools.

    `field` is the list of tools, and `name_field` the field of a tool that holds its name. Raises
    RequestError for too many tools, a wrong name, one name twice, or parameters that are no object.
    """
    check_num_tools(len(tools), field)
    names: set[str] = set()
    for i, tool in enumerate(tools):
        where = f"{field}[{i}].{name_field}"
        if not _NAME.fullmatch(tool.name):
            message = f"{where} must have 1 to 128 letters, digits, or any of _ . : / -"
            raise RequestError(message, param=where)
        if tool.name in names:
            message = f"{where}: there is another tool of the name {tool.name!r}"
            raise RequestError(message, param=where)
        names.add(tool.name)
        if not _is_object(tool.parameters):
            where = f"{field}[{i}]"
            message = f"{where}: the parameters must be a JSON schema of type object"
            raise RequestError(message, param=where)
    return tuple(tools)


def _is_object(schema: Schema) -> bool:
    """Whether a schema may be that of objects: one without a type becomes so."""
    if "type" in schema:
        return schema["type"] == "object"
    return "const" not in schema and "enum" not in schema


def check_num_tools(count: int, field: str = "tools") -> None:
    """Raises RequestError for too many tools, before they are read."""
    if count > MAX_TOOLS:
        raise RequestError(f"{field} has {count} tools; at most {MAX_TOOLS}", param=field)


def check_choice(choice: ToolChoice, tools: Sequence[Tool], *, empty_field: str) -> ToolChoice:
    """Returns the choice.

    Raises RequestError for a call that must come without tools, naming `empty_field`, and for a
    named tool that is not among them.
    """
    if choice.mode in (ChoiceMode.REQUIRED, ChoiceMode.NAMED) and not tools:
        message = "tool_choice asks for a call, but there are no tools"
        raise RequestError(message, param=empty_field)
    if choice.name is not None and all(tool.name != choice.name for tool in tools):
        raise not_among(choice.name)
    return choice


def not_among(name: str) -> RequestError:
    message = f"tool_choice names {name[:100]!r}, which is not among the tools"
    return RequestError(message, param="tool_choice")
