"""Progress of fetching and converting files, as lines for people."""

import time
from collections.abc import Callable

_PROGRESS_EVERY_S = 1.0


class FileProgress:
    """A `Progress` callback that turns byte counts into a line now and then."""

    def __init__(self, verb: str, say: Callable[[str], None]) -> None:
        self._verb = verb
        self._say = say
        self._next_s = 0.0

    def __call__(self, done_bytes: int, total_bytes: int) -> None:
        """`total_bytes` 0 means that it is not known."""
        now_s = time.monotonic()
        is_done = 0 < total_bytes == done_bytes
        if not done_bytes or (now_s < self._next_s and not is_done):
            return
        self._next_s = now_s + _PROGRESS_EVERY_S
        of_total = f" of {total_bytes / 1e6:.0f}" if total_bytes else ""
        self._say(f"{self._verb}: {done_bytes / 1e6:.0f}{of_total} MB")
