"""Stop strings, matched on text as it grows, across the borders of tokens and pieces."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StopMatch:
    """A found stop string at characters [start, end) of everything fed so far."""

    stop: str
    start: int
    end: int


class StopMatcher:
    """Releases text that can no longer become part of a stop string, and finds the first one.

    The match is the one that starts earliest in the whole text; of several that start there, the
    shortest. That does not depend on how the text was cut when it was fed. One per sequence.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(stops):
            raise ValueError("a stop string must not be empty")
        self._stops = sorted(set(stops), key=len)
        self._first_chars = frozenset(stop[0] for stop in stops)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""  # suffix of the text that is withheld
        self._released = 0  # number of characters before it
        self.match: StopMatch | None = None
        # False while a stop string is complete but an earlier one may still become complete: until
        # then it is open whether the text goes on.
        self.settled = True

    def feed(self, text: str) -> str:
        """Adds text and returns what is released; nothing more once `match` is set."""
        if self.match is not None:
            return ""
        self._held += text
        found = self._find(self._held)
        self.settled = found is None
        candidate = self._open_candidate(len(self._held) if found is None else found[0])
        if found is not None and candidate >= found[0]:
            return self._end(*found)
        return self._release(candidate)

    def flush(self) -> str:
        """Ends the text and returns what was withheld."""
        if self.match is not None:
            return ""
        found = self._find(self._held)
        return self._release(len(self._held)) if found is None else self._end(*found)

    def _find(self, text: str) -> tuple[int, str] | None:
        """The earliest complete stop string, the shortest of those that start there."""
        hits = [(start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        return min(hits, key=lambda hit: hit[0]) if hits else None

    def _open_candidate(self, before: int) -> int:
        """First index before `before` from which a stop string may still grow, else `before`."""
        held = self._held
        for start in range(max(0, len(held) - self._longest + 1), before):
            if held[start] in self._first_chars:
                rest = held[start:]
                if any(stop.startswith(rest) for stop in self._stops):
                    return start
        return before

    def _end(self, start: int, stop: str) -> str:
        begin = self._released + start
        self.settled = True
        self.match = StopMatch(stop, begin, begin + len(stop))
        return self._release(start)

    def _release(self, end: int) -> str:
        text, self._held = self._held[:end], self._held[end:]
        self._released += end
        return text
