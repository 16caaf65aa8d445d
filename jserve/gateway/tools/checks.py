"""Checks of the tools of a request, and of its choice among them, for every API."""

import re
from collections.abc import Sequence

from jserve.core.errors import RequestError
from jserve.gateway.tools.format import ChoiceMode, Tool, ToolChoice

MAX_TOOLS = 256
_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")


def check_tools(tools: Sequence[Tool], *, inner: str = ".function") -> tuple[Tool, ...]:
    """Returns the tools; RequestError for too many, a wrong name, or one name twice.

    `inner` is the path from an entry of `tools` to the function's fields, as errors name it.
    """
    check_num_tools(len(tools))
    names: set[str] = set()
    for i, tool in enumerate(tools):
        where = f"tools[{i}]{inner}.name"
        if not _NAME.fullmatch(tool.name):
            message = f"{where} must have 1 to 128 letters, digits, or any of _ . : / -"
            raise RequestError(message, param=where)
        if tool.name in names:
            raise RequestError(f"{where}: {tool.name!r} is there twice", param=where)
        names.add(tool.name)
    return tuple(tools)


def check_num_tools(number: int) -> None:
    """Raises RequestError if there are too many."""
    if number > MAX_TOOLS:
        raise RequestError(f"tools has {number} tools; at most {MAX_TOOLS}", param="tools")


def check_choice(choice: ToolChoice, tools: Sequence[Tool]) -> None:
    """Raises RequestError if a call is asked for that the tools do not allow."""
    if choice.mode in (ChoiceMode.REQUIRED, ChoiceMode.NAMED) and not tools:
        raise RequestError("tool_choice asks for a call, but there are no tools", param="tools")
    if choice.name is not None and choice.name not in {tool.name for tool in tools}:
        message = f"tool_choice names {choice.name[:100]!r}, which is not among the tools"
        raise RequestError(message, param="tool_choice")
