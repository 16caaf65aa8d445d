"""Fields that several chat APIs have under different names."""

from typing import Any


def read_thinking(
    effort: str | None, *, enabled: bool | None = None
) -> tuple[int | None, dict[str, Any]]:
    """Returns the budget of reasoning, None for no bound, and variables for the template.

    The effort `none` disables reasoning. Then the budget is 0, for templates without a switch;
    the switch is set by both names that models' templates have for it.
    """
    variables: dict[str, Any] = {} if effort is None else {"reasoning_effort": effort}
    if effort == "none":
        enabled = False
    if enabled is None:
        return None, variables
    switch = {"enable_thinking": enabled, "thinking": enabled}
    return None if enabled else 0, switch | variables
