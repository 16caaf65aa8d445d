"""Reads the text of one choice of a chat: reasoning, text and calls of tools, as they come."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from jserve.core.request import FinishReason
from jserve.gateway.output import OutputDelta
from jserve.gateway.reasoning.format import ReasoningParser, ReasoningPart
from jserve.gateway.tools.format import CallPart, TextPart, ToolParser

ChatPart: TypeAlias = ReasoningPart | TextPart | CallPart


@dataclass(frozen=True, slots=True)
class ChatDelta:
    """New parts of one choice; `finish` as the delta has it, but for calls that end an answer."""

    delta: OutputDelta
    parts: Sequence[ChatPart]
    finish: str | None = None  # stop, length, tool_calls, abort or error
    reasoning_tokens: int = 0  # of this delta


@dataclass(frozen=True, slots=True)
class WholeAnswer:
    """What the parts of one choice say, joined."""

    reasoning: str
    text: str
    calls: Sequence[tuple[str, str]]  # names and arguments

    @classmethod
    def of(cls, parts: Sequence[ChatPart]) -> "WholeAnswer":
        """Joins all parts of a choice."""
        reasoning: list[str] = []
        texts: list[str] = []
        calls: list[tuple[str, list[str]]] = []
        for part in parts:
            match part:
                case ReasoningPart(text):
                    reasoning.append(text)
                case TextPart(text):
                    texts.append(text)
                case CallPart(_, name, arguments):
                    if name is not None:
                        calls.append((name, []))
                    calls[-1][1].append(arguments)
        joined = [(name, "".join(arguments)) for name, arguments in calls]
        return cls("".join(reasoning), "".join(texts), joined)


class ChatReader:
    """One per choice. The joined parts don't depend on how the text was cut."""

    def __init__(
        self,
        reasoning: ReasoningParser | None,
        calls: ToolParser | None,
        *,
        named: bool = False,
        reasoning_end: Sequence[int] = (),
    ) -> None:
        """`named`: the client named the tool, so its call is no reason to end, as OpenAI has it."""
        self._reasoning = reasoning
        self._calls = calls
        self._named = named
        self._num_calls = 0
        self._counter = _ReasoningTokens(reasoning_end)

    def feed(self, delta: OutputDelta) -> ChatDelta:
        """Reads the next delta."""
        if self._reasoning is None and self._calls is None:  # as in most chats
            finish = None if delta.finish is None else delta.finish.value
            return ChatDelta(delta, (TextPart(delta.text),) if delta.text else (), finish)
        parts: list[ChatPart] = []
        for part in self._split(delta.text):
            self._read(part, parts)
        if delta.finish is not None:
            for part in () if self._reasoning is None else self._reasoning.finish():
                self._read(part, parts)
            parts += () if self._calls is None else self._calls.finish()
        for part in parts:
            if isinstance(part, CallPart):
                self._num_calls = max(self._num_calls, part.index + 1)
        reasons = any(isinstance(part, ReasoningPart) for part in parts)
        last = delta.finish is not None
        num_reasoning = self._counter.feed(delta.token_ids, reasons, last=last)
        return ChatDelta(delta, parts, self._finish(delta.finish), num_reasoning)

    def _split(self, text: str) -> Sequence[ReasoningPart | TextPart]:
        if self._reasoning is not None:
            return self._reasoning.feed(text)
        return (TextPart(text),) if text else ()

    def _read(self, part: ReasoningPart | TextPart, parts: list[ChatPart]) -> None:
        if isinstance(part, TextPart) and self._calls is not None:
            parts += self._calls.feed(part.text)
        else:
            parts.append(part)

    def _finish(self, finish: FinishReason | None) -> str | None:
        if finish is None:
            return None
        if finish is FinishReason.STOP and self._num_calls and not self._named:
            return "tool_calls"
        return finish.value


class _ReasoningTokens:
    """Counts the tokens before those that end the reasoning, once there was some."""

    def __init__(self, end: Sequence[int]) -> None:
        self._end = list(end)
        self._last: list[int] = []  # the last ones, which may begin the end
        self._unsure = 0  # tokens that may be reasoning: none of it has been seen
        self._begun = False
        self._over = not end

    def feed(self, tokens: Sequence[int], reasons: bool, *, last: bool) -> int:
        """Returns the number of tokens that are known to be reasoning now."""
        if self._over:
            return 0
        for token in tokens:
            self._last.append(token)
            if self._last == self._end:
                self._last.clear()
                self._over = True
                break
            if len(self._last) == len(self._end):
                del self._last[0]
                self._unsure += 1
        if last:
            self._unsure += len(self._last)
        self._begun |= reasons
        if not self._begun:
            return 0
        found, self._unsure = self._unsure, 0
        return found
