"""Clocks, passed as arguments: the wall clock for serving, a manual one for tests."""

import time
from typing import Protocol


class Clock(Protocol):
    """A monotonic source of seconds."""

    def now_s(self) -> float:
        """Seconds since an arbitrary, fixed moment; never goes back."""
        ...


class WallClock:
    """The monotonic clock of the machine, shared by all processes of one host."""

    def now_s(self) -> float:
        return time.monotonic()


class ManualClock:
    """A clock that moves only when told to. Owned by the test or simulation that made it."""

    def __init__(self, now_s: float = 0.0) -> None:
        self._now_s = now_s

    def now_s(self) -> float:
        return self._now_s

    def advance(self, seconds: float) -> None:
        if seconds < 0:
            raise ValueError(f"advance: time cannot go back by {-seconds} s")
        self._now_s += seconds
