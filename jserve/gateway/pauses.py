"""Pauses in which the event loop serves others, for work that comes in many small parts."""

import asyncio

# A list of more numbers is long, and is built in pieces. As many take one or two milliseconds.
LARGE = 1000
_BUSY_S = 0.002  # of work between two pauses


class Pauses:
    """Gives way to other tasks after each few milliseconds of work. Owned by one task."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._busy_s = 0.0  # since the last pause
        self._start_s = self._loop.time()

    def start(self) -> None:
        """A part begins; the first one has begun with this object."""
        self._start_s = self._loop.time()

    async def end(self) -> None:
        """A part has ended, and the next one begins unless `start` is called."""
        now_s = self._loop.time()
        self._busy_s += now_s - self._start_s
        if self._busy_s > _BUSY_S:
            await asyncio.sleep(0)
            self._busy_s, now_s = 0.0, self._loop.time()
        self._start_s = now_s
