"""The parser that all formats share: text, and calls where a marker says that one follows."""

import contextlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from jserve.gateway.tools.format import Part, Tool
from jserve.gateway.tools.reading import NotACall, Reading, Steps, num_open

Body: TypeAlias = Callable[[Reading], Steps[None]]


@dataclass(frozen=True, slots=True)
class Marked:
    """Calls between an opening marker and the closings that may follow them.

    `body` reads the calls. It ends where they do, or raises NotACall where they stop being calls.
    """

    opening: str
    body: Body
    closings: tuple[str, ...] = ()


class CallParser:
    """Splits a growing text into text and calls; see `ToolParser`.

    `leading` is tried where the text begins, without a marker; its opening is empty.
    """

    def __init__(
        self, tools: Sequence[Tool], marked: Sequence[Marked], leading: Marked | None = None
    ) -> None:
        self._reading = Reading([tool.name for tool in tools])
        self._marked = {one.opening: one for one in marked} if tools else {}
        openings = sorted(self._marked, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, openings)) or r"(?!)")
        self._leading = leading if tools else None
        self._space: list[str] = []  # read last, and written only if text follows
        self._steps = self._read()
        next(self._steps)

    def feed(self, text: str) -> list[Part]:
        """Adds text and returns the parts that are certain now."""
        if text:
            self._advance(text, last=False)
        return self._reading.take_parts()

    def finish(self) -> list[Part]:
        """Ends the text and returns what was withheld."""
        self._advance("", last=True)
        return self._reading.take_parts()

    def _advance(self, text: str, *, last: bool) -> None:
        self._reading.add(text, last=last)
        next(self._steps, None)

    def _read(self) -> Steps[None]:
        if self._leading is not None:
            self._reading.hold()
            yield from self._read_calls(self._leading)
        while (marked := (yield from self._read_text())) is not None:
            yield from self._read_calls(marked)

    def _read_text(self) -> Steps[Marked | None]:
        """Reads up to and with the next opening marker, or to the end."""
        reading = self._reading
        while True:
            if found := self._pattern.search(reading.text, reading.pos):
                self._write_until(found.start())
                reading.hold("".join(self._space))
                self._space.clear()
                reading.pos = found.end()
                return self._marked[found.group()]
            open_ = num_open(reading.text, reading.pos, self._marked)
            self._write_until(len(reading.text) - open_)
            if not (yield from reading.more()):
                self._write_until(len(reading.text))
                if not reading.calls or reading.spoke_since_call:
                    reading.write("".join(self._space))
                return None

    def _write_until(self, end: int) -> None:
        """Writes the text before `end` but for white space that ends it."""
        piece = self._reading.text[self._reading.pos : end]
        self._reading.pos = end
        written = piece.rstrip(" \t\r\n")
        if written:
            self._reading.write("".join(self._space) + written)
            self._space.clear()
        if len(written) < len(piece):
            self._space.append(piece[len(written) :])

    def _read_calls(self, marked: Marked) -> Steps[None]:
        """Reads the calls that follow an opening, and a closing. What is none becomes text."""
        reading, before = self._reading, self._reading.calls
        # A body may stop anywhere; the calls that it began stand.
        with contextlib.suppress(NotACall):
            yield from marked.body(reading)
        rest = reading.give_back() if reading.holding else ""
        if reading.calls == before or rest.strip(" \t\r\n"):
            reading.write(rest)
            return
        reading.hold(rest)
        yield from reading.space()
        if (yield from reading.take(*marked.closings)):
            reading.drop()
        elif reading.cut_off(marked.closings):
            reading.drop()
            reading.pos = len(reading.text)
        else:
            self._space.append(reading.give_back())
