"""JSON arrays that are too long for one step: encoded in pieces, with rests between them.

They are built in a thread. While it computes, the event loop waits for the interpreter's lock, up
to five milliseconds each time that it needs it; in a rest it gets the lock at once.
"""

import time
from typing import Any

import orjson

from jserve.gateway.pauses import LARGE

REST_S = 1e-4  # zero would end before the other thread is awake


class LongList:
    """Values of one array, in order. Owned by one thread, which is the event loop's for `LARGE`."""

    def __init__(self) -> None:
        self._values: list[Any] = []  # of the piece that grows
        self._size = 0  # of that piece
        self._pieces: list[bytes] = []

    def append(self, value: Any, size: int = 1) -> None:
        """Adds a value with `size` numbers in it."""
        if self._size + size > LARGE and self._values:
            self._encode()
            time.sleep(REST_S)
        self._values.append(value)
        self._size += size

    def json(self) -> list[Any] | orjson.Fragment:
        """The array for `orjson.dumps`: as it is, or encoded if it is long."""
        if not self._pieces:
            return self._values
        self._encode()
        return orjson.Fragment(b"[" + b",".join(self._pieces) + b"]")

    def _encode(self) -> None:
        self._pieces.append(orjson.dumps(self._values)[1:-1])
        self._values, self._size = [], 0
