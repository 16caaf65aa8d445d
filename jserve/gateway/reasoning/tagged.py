"""Reasoning between two tags, as in `<think>...</think>`."""

from dataclasses import dataclass
from enum import Enum, auto

from jserve.gateway.reasoning.format import Part, ReasoningPart
from jserve.gateway.tools.format import TextPart
from jserve.gateway.tools.reading import num_open

_SPACE = " \t\r\n"


@dataclass(frozen=True, slots=True)
class Tagged:
    """Reasoning from `start` to `end`.

    It comes before all other text, or where `anywhere` is set also after some. An opening tag that
    repeats the prompt's is no part of the reasoning.
    """

    name: str
    start: str
    end: str
    anywhere: bool = False

    @property
    def markers(self) -> tuple[str, ...]:
        return self.start, self.end

    def parser(self, *, starts_inside: bool = False) -> "TaggedParser":
        return TaggedParser(self, starts_inside=starts_inside)

    def starts_inside(self, prompt: str, *, continued: str = "") -> bool:
        if continued.strip():
            return continued.rfind(self.start) > continued.rfind(self.end)
        return prompt.rstrip().endswith(self.start)


THINK = Tagged("think", "<think>", "</think>")
MISTRAL = Tagged("mistral", "[THINK]", "[/THINK]", anywhere=True)
GEMMA_4 = Tagged("gemma4", "<|channel>thought", "<channel|>", anywhere=True)


class _State(Enum):
    BEGIN = auto()  # nothing but white space was read
    REASONING = auto()
    TEXT = auto()


class TaggedParser:
    """See `ReasoningParser`."""

    def __init__(self, tags: Tagged, *, starts_inside: bool) -> None:
        self._tags = tags
        self._state = _State.BEGIN
        self._inside = starts_inside  # if no opening tag comes first
        self._text = ""  # from `_pos` on not read yet, since it may become a tag
        self._pos = 0
        self._space: list[str] = []  # read last, and given out only if something follows
        self._trims = False  # whether white space before the next text belongs to a tag
        self._parts: list[Part] = []

    def feed(self, text: str) -> list[Part]:
        """Adds text and returns the parts that are certain now."""
        return self._advance(text, last=False)

    def finish(self) -> list[Part]:
        """Ends the text and returns what was withheld."""
        return self._advance("", last=True)

    def _advance(self, text: str, *, last: bool) -> list[Part]:
        self._text = self._text[self._pos :] + text
        self._pos = 0
        while self._step(last=last):
            pass
        if last and self._state is _State.TEXT and self._space:
            self._parts.append(TextPart("".join(self._space)))
            self._space.clear()
        parts, self._parts = self._parts, []
        return parts

    def _step(self, *, last: bool) -> bool:
        """Reads up to a tag, or all that is certain. Returns whether more can be read."""
        if self._state is _State.BEGIN:
            return self._begin(last=last)
        inside = self._state is _State.REASONING
        tag = self._tags.end if inside else self._tags.start
        may_follow = inside or self._tags.anywhere
        at = self._text.find(tag, self._pos) if may_follow else -1
        if at >= 0:
            self._put(at, inside=inside)
            self._pos += len(tag)
            self._space.clear()
            self._trims = True
            self._state = _State.TEXT if inside else _State.REASONING
            return True
        waits = may_follow and not last
        num_waiting = num_open(self._text, self._pos, (tag,)) if waits else 0
        self._put(len(self._text) - num_waiting, inside=inside)
        return False

    def _begin(self, *, last: bool) -> bool:
        rest = self._text[self._pos :].lstrip(_SPACE)
        begin = len(self._text) - len(rest)
        if begin > self._pos:
            self._space.append(self._text[self._pos : begin])
        self._pos = begin
        start = self._tags.start
        if rest.startswith(start):
            self._pos += len(start)
            self._inside = True
        elif start.startswith(rest) and not last:
            return False
        self._state = _State.REASONING if self._inside else _State.TEXT
        if self._inside:
            self._space.clear()
            self._trims = True
        return True

    def _put(self, end: int, *, inside: bool) -> None:
        """Gives the text before `end` out, but for white space before and after a tag."""
        text = self._text[self._pos : end]
        self._pos = end
        if self._trims:
            text = text.lstrip(_SPACE)
            self._trims = not text
        holds = inside or self._tags.anywhere  # a tag may follow
        kept = text.rstrip(_SPACE) if holds else text
        if kept:
            whole = "".join(self._space) + kept
            self._space.clear()
            self._parts.append(ReasoningPart(whole) if inside else TextPart(whole))
        if len(kept) < len(text):
            self._space.append(text[len(kept) :])
