"""Reading of what several chat APIs ask for under different names."""

from collections.abc import Sequence
from typing import Any

from jserve.core.errors import RequestError
from jserve.gateway.tools.format import Tool


def check_tool_names(tools: Sequence[Tool]) -> Sequence[Tool]:
    """Returns the tools. Raises RequestError if two have the same name."""
    seen: set[str] = set()
    for i, tool in enumerate(tools):
        if tool.name in seen:
            message = f"tools[{i}]: there is another tool of the name {tool.name[:60]!r}"
            raise RequestError(message, param=f"tools[{i}]")
        seen.add(tool.name)
    return tools


def thinking_variables(enabled: bool) -> dict[str, Any]:
    """Variables that switch reasoning on or off, by the names that models' templates have."""
    return {"enable_thinking": enabled, "thinking": enabled}
