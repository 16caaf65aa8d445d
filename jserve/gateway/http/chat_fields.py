"""Fields that several chat APIs have under different names."""

from typing import Any


def thinking_variables(enabled: bool) -> dict[str, Any]:
    """Variables that switch reasoning on or off, by the names that models' templates have."""
    return {"enable_thinking": enabled, "thinking": enabled}
