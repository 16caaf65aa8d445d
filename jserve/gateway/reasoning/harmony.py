"""Harmony, the format of gpt-oss: messages in channels, each with a header.

`analysis` is reasoning; `final` and `commentary` are text. A message to one of the request's
functions is a call: it comes out as text with its header, for the tool format `harmony`. Messages
to the model's built-in tools are reasoning.
"""

import re
from collections.abc import Callable

from jserve.gateway.reasoning.format import Part, ReasoningPart
from jserve.gateway.tools.format import TextPart
from jserve.gateway.tools.reading import num_open

_START, _CHANNEL, _MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
_CONSTRAIN, _END, _RETURN, _CALL = "<|constrain|>", "<|end|>", "<|return|>", "<|call|>"
_CLOSINGS = (_END, _RETURN, _CALL, _START, _CHANNEL)  # models forget an end before a start
_BODY_END = re.compile("|".join(map(re.escape, _CLOSINGS)))
_OPENINGS = (_START, _CHANNEL, "to=")
_SPACE = re.compile(r"\s*")
_RECIPIENT = re.compile(r"to=([^\s<]+)")
_CHANNEL_NAME = re.compile(re.escape(_CHANNEL) + r"\s*(\w+)")
# A header is longer only if the model has lost its way.
_MAX_HEADER_CHARS = 1000


class Harmony:
    """The format `openai_gptoss`."""

    name = "openai_gptoss"
    start = f"{_CHANNEL}analysis{_MESSAGE}"
    end = _END
    markers = (_START, _CHANNEL, _MESSAGE, _CONSTRAIN, _END, _RETURN, _CALL)

    def parser(self, *, starts_inside: bool = False) -> "HarmonyParser":
        return HarmonyParser(starts_inside=starts_inside)

    def starts_inside(self, prompt: str, *, continued: str = "") -> bool:
        if continued.strip():
            return continued.rfind(self.start) > continued.rfind(self.end)
        return prompt.rstrip().endswith(self.start)


class HarmonyParser:
    """See `ReasoningParser`."""

    def __init__(self, *, starts_inside: bool) -> None:
        self._text = ""  # from `_pos` on not read yet
        self._pos = 0
        self._in_header = not starts_inside
        self._kind: Callable[[str], Part] = ReasoningPart
        self._is_call = False
        self._wrote: set[Callable[[str], Part]] = set()  # kinds that have text
        self._separates = False  # whether the next piece begins a further message of its kind
        self._parts: list[Part] = []

    def feed(self, text: str) -> list[Part]:
        """Adds text and returns the parts that are certain now."""
        return self._advance(text, last=False)

    def finish(self) -> list[Part]:
        """Ends the text and returns what was withheld; half a header says nothing."""
        return self._advance("", last=True)

    def _advance(self, text: str, *, last: bool) -> list[Part]:
        self._text = self._text[self._pos :] + text
        self._pos = 0
        while self._read_header(last=last) if self._in_header else self._read_body(last=last):
            pass
        parts, self._parts = self._parts, []
        return parts

    def _read_header(self, *, last: bool) -> bool:
        """Reads a header, once it is whole. Returns whether there may be more to read."""
        space = _SPACE.match(self._text, self._pos)
        assert space is not None  # it matches nothing, too
        self._pos = space.end()
        text = self._text[self._pos : self._pos + _MAX_HEADER_CHARS]
        opened = text.startswith(_OPENINGS)
        if not opened and (last or not any(one.startswith(text) for one in _OPENINGS)):
            self._open(TextPart, call="")  # a message without a header
            return text != ""
        at = text.find(_MESSAGE)
        if at < 0:
            if len(text) < _MAX_HEADER_CHARS:
                return False
            self._open(TextPart, call="")
            self._put(self._pos + _MAX_HEADER_CHARS)
            return True
        header = text[:at]
        self._pos += at + len(_MESSAGE)
        recipient = _RECIPIENT.search(header)
        channel = _CHANNEL_NAME.search(header)
        name = channel.group(1) if channel else "final"
        if recipient and recipient.group(1).startswith("functions."):
            self._open(TextPart, call=f"{_CHANNEL}commentary to={recipient.group(1)}{_MESSAGE}")
        else:
            self._open(ReasoningPart if recipient or name == "analysis" else TextPart, call="")
        return True

    def _open(self, kind: Callable[[str], Part], *, call: str) -> None:
        """Begins the body of a message."""
        self._in_header = False
        self._kind = kind
        self._is_call = bool(call)
        self._separates = not call and kind in self._wrote
        if call:
            self._parts.append(kind(call))

    def _read_body(self, *, last: bool) -> bool:
        found = _BODY_END.search(self._text, self._pos)
        if found is None:
            num_waiting = 0 if last else num_open(self._text, self._pos, _CLOSINGS)
            self._put(len(self._text) - num_waiting)
            return False
        self._put(found.start())
        if self._is_call:
            self._parts.append(TextPart(_CALL))
        if found.group() not in (_START, _CHANNEL):  # which begin the next header
            self._pos = found.end()
        self._in_header = True
        return True

    def _put(self, end: int) -> None:
        """Gives the text before `end` out."""
        text = self._text[self._pos : end]
        self._pos = end
        if not text:
            return
        if self._separates:
            text = "\n" + text
        self._separates = False
        if not self._is_call:
            self._wrote.add(self._kind)
        self._parts.append(self._kind(text))
