"""A text that is read while it grows, and the parts that were made of it.

Readers are generators: they read front to back and yield when they need more text, so that a format
is written down as if its whole text were there.
"""

import re
from collections.abc import Callable, Collection, Generator
from typing import TypeAlias, TypeVar

from jserve.gateway.tools.format import CallPart, Part, TextPart

T = TypeVar("T")
Steps: TypeAlias = Generator[None, None, T]  # yields while it waits for text; returns a T

_SPACE = re.compile(r"[ \t\r\n]*")


def num_open(text: str, pos: int, literals: Collection[str]) -> int:
    """Number of last characters, none before `pos`, that may be the beginning of a literal."""
    longest = max(map(len, literals), default=1)
    for start in range(max(pos, len(text) - longest + 1), len(text)):
        if any(literal.startswith(text[start:]) for literal in literals):
            return len(text) - start
    return 0


class NotACall(Exception):
    """What is being read is no call, or is cut off."""


class Reading:
    """The text at hand, and the parts written so far. Owned by one parser.

    Readers move `pos` over `text` freely but forward only; `more` replaces both. After `hold`, what
    is read is kept until it either became a call (`begin`, `drop`) or is given back.
    """

    def __init__(self, tools: Collection[str]) -> None:
        self.tools = frozenset(tools)
        self.text = ""
        self.pos = 0
        self.ended = False
        self.calls = 0  # number of calls begun
        self._held: list[str] | None = None
        self._held_from = 0  # what is held of `text` starts here
        self._parts: list[Part] = []
        self._pieces: list[str] = []  # of the part that is being written
        self._writing: str | CallPart | None = None  # its kind: "" for text, else its call
        self.spoke_since_call = False

    # Text in

    def add(self, text: str, *, last: bool = False) -> None:
        """Appends text; what has been read is forgotten."""
        if self._held is not None:
            self._held.append(self.text[self._held_from : self.pos])
            self._held_from = 0
        self.text = self.text[self.pos :] + text
        self.pos = 0
        self.ended = last

    @property
    def at_end(self) -> bool:
        return self.ended and self.pos == len(self.text)

    def more(self) -> Steps[bool]:
        """Waits for more text, which may be empty; False once there is none to come."""
        if self.ended:
            return False
        yield
        return True

    def space(self) -> Steps[None]:
        """Reads over white space."""
        while True:
            match = _SPACE.match(self.text, self.pos)
            assert match is not None  # it matches nothing, too
            self.pos = match.end()
            if self.pos < len(self.text) or not (yield from self.more()):
                return

    def peek(self) -> Steps[str]:
        """Returns the next character, or "" at the end, without reading it."""
        while self.pos == len(self.text):
            if not (yield from self.more()):
                return ""
        return self.text[self.pos]

    def take(self, *literals: str) -> Steps[str]:
        """Reads the literal that comes next and returns it, or "" if none does.

        Literals that begin with another one must come before it.
        """
        while True:
            open_ = False
            for literal in literals:
                ahead = self.text[self.pos : self.pos + len(literal)]
                if ahead == literal:
                    self.pos += len(literal)
                    return literal
                if literal.startswith(ahead):
                    open_ = True
                    break
            if not open_ or not (yield from self.more()):
                return ""

    def cut_off(self, literals: Collection[str]) -> bool:
        """Whether the text ends in the middle of a literal that would come next."""
        rest = self.text[self.pos : self.pos + max(map(len, literals), default=0)]
        return self.ended and rest != "" and any(one.startswith(rest) for one in literals)

    def expect(self, *literals: str) -> Steps[str]:
        """Reads one of the literals; raises NotACall if none comes next."""
        taken = yield from self.take(*literals)
        if not taken:
            raise NotACall
        return taken

    def word(self, pattern: re.Pattern[str], *, most: int = 400) -> Steps[str]:
        """Reads as many characters as `pattern` matches; raises NotACall beyond `most`."""
        while True:
            match = pattern.match(self.text, self.pos)
            end = self.pos if match is None else match.end()
            if end - self.pos > most:
                raise NotACall
            if end < len(self.text) or not (yield from self.more()):
                word, self.pos = self.text[self.pos : end], end
                return word

    def until(self, write: Callable[[str], object], *closings: str) -> Steps[str]:
        """Reads text up to and with the first of the closings, or to the end.

        Gives what comes before it to `write` as it comes; returns the closing, or "" at the end.
        The beginning of a closing that the text's end cuts off is dropped.
        """
        pattern = re.compile("|".join(map(re.escape, closings)))
        while True:
            found = pattern.search(self.text, self.pos)
            end = found.start() if found else len(self.text)
            if not found:
                end -= num_open(self.text, self.pos, closings)
            if end > self.pos:
                write(self.text[self.pos : end])
            self.pos = found.end() if found else end
            if found:
                return found.group()
            if not (yield from self.more()):
                self.pos = len(self.text)
                return ""

    # Text that may turn out to be no call

    def hold(self, before: str = "") -> None:
        """Keeps `before` and what is read from here on, to give it back."""
        self._held = [before] if before else []
        self._held_from = self.pos

    @property
    def holding(self) -> bool:
        return self._held is not None

    def drop(self) -> None:
        """Forgets what is held: it was a call, or its punctuation."""
        self._held = None

    def give_back(self) -> str:
        """Returns what is held and holds no longer."""
        held, self._held = self._held or [], None
        return "".join([*held, self.text[self._held_from : self.pos]])

    # Parts out

    def write(self, text: str) -> None:
        """Writes text of the answer."""
        if text:
            self._turn("")
            self._pieces.append(text)
            self.spoke_since_call = True

    def begin(self, name: str) -> None:
        """Begins a call: what is held is part of it."""
        self.drop()
        self._turn(CallPart(self.calls, name, ""))
        self.calls += 1
        self.spoke_since_call = False

    def arguments(self, piece: str) -> None:
        """Writes the next piece of the call's arguments."""
        if self._writing is None:
            self._writing = CallPart(self.calls - 1, None, "")
        self._pieces.append(piece)

    def take_parts(self) -> list[Part]:
        """Returns what was written since the last time."""
        self._turn(None)
        parts, self._parts = self._parts, []
        return parts

    def _turn(self, to: str | CallPart | None) -> None:
        """Ends the part that is being written, unless text goes on as text."""
        if to == "" and self._writing == "":
            return
        piece = "".join(self._pieces)
        if isinstance(self._writing, CallPart):
            if piece or self._writing.name is not None:
                self._parts.append(CallPart(self._writing.index, self._writing.name, piece))
        elif piece:
            self._parts.append(TextPart(piece))
        self._pieces.clear()
        self._writing = to
