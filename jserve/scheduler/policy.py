"""Who goes first, and for how long: pure functions. Policies rank, the scheduler allocates."""

from collections.abc import Callable

from jserve.core.request import Request

# Smaller ranks are served first and preempted last. No two are equal.
Rank = tuple[float, ...]

# Ranks a request when it arrives, from itself and its arrival number (0, 1, 2, …). A rank never
# changes: a preempted sequence goes back to its place.
Policy = Callable[[Request, int], Rank]


def first_come_first_served(request: Request, arrival: int) -> Rank:
    """Smaller `priority` first, then the earlier arrival."""
    return (request.priority, arrival)


def decode_steps(most: int, remaining: list[int], *, waiting: bool) -> int:
    """Decode steps of the next run, at most `most`.

    `remaining` are the tokens that each row may still get; no run outlasts the longest. While
    somebody waits, it ends where the first row reaches its limit: the slot is taken over at once.
    """
    ends = min if waiting else max
    return min(most, ends(remaining, default=0))
