"""What a person reads in the terminal while a server starts: plain lines on standard output."""

import sys
import time
from collections.abc import Mapping
from typing import TextIO


class Console:
    """Prints progress with the seconds since it was made. Owned by the launcher."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout
        self._start_s = time.monotonic()

    def say(self, text: str) -> None:
        """One line of progress."""
        elapsed_s = time.monotonic() - self._start_s
        print(f"[{elapsed_s:6.1f} s] {text}", file=self._stream, flush=True)

    def table(self, title: str, rows: Mapping[str, str]) -> None:
        """A block of names and values."""
        width = max(map(len, rows), default=0)
        lines = [f"  {name:<{width}}  {value}" for name, value in rows.items()]
        print("\n".join(["", title, *lines]), file=self._stream, flush=True)

    def text(self, text: str) -> None:
        """Anything else, as it is."""
        print(text, file=self._stream, flush=True)
