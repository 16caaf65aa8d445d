"""Parts of an answer → output items of a response, and the events that tell of them. Pure."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import orjson

from jserve.gateway.chat_reader import ChatDelta, ChatPart
from jserve.gateway.http.responses.items import Item, call_arguments, new_id
from jserve.gateway.reasoning.format import ReasoningPart
from jserve.gateway.tools.format import TextPart

Event = dict[str, Any]  # with its type; the sequence number is the writer's


class _OpenItem(Protocol):
    """The item that grows, and the events of its beginning, growth and end."""

    def opening(self) -> list[Event]: ...

    def grow(self, text: str, logprobs: bytes) -> list[Event]: ...

    def closing(self, status: str) -> list[Event]: ...

    def item(self, status: str) -> Item: ...


class ResponseOutput:
    """The output of one response, as it grows. Items follow one another; the last one is open."""

    def __init__(self, make_call_id: Callable[[], str], *, logprobs: bool) -> None:
        self.items: list[Item] = []  # closed ones
        self.status: str | None = None  # of the response, once the answer has ended
        self.num_tokens = 0
        self.reasoning_tokens = 0
        self.cached_tokens = 0
        self._make_call_id = make_call_id
        self._logprobs = logprobs
        self._held: list[bytes] = []  # log-probabilities of tokens without a part yet
        self._open: _OpenItem | None = None
        self._call = -1  # number of the open call

    def feed(self, delta: ChatDelta, logprobs: bytes = b"") -> list[Event]:
        """Adds a delta; `logprobs` are the elements of its tokens' JSON array."""
        self.num_tokens += len(delta.delta.token_ids)
        self.reasoning_tokens += delta.reasoning_tokens
        self.cached_tokens += delta.delta.cached_tokens
        self._hold(delta.parts, logprobs)
        events: list[Event] = []
        for part in delta.parts:
            events += self._add(part)
        if delta.finish is not None:
            events += self._finish(delta.finish)
        return events

    def break_off(self) -> None:
        """Closes the open item as incomplete, when nobody reads the events any more."""
        self._close("incomplete")

    def _hold(self, parts: Sequence[ChatPart], logprobs: bytes) -> None:
        # A token's text may come with a later delta. What was no text in the end, such as the
        # markers of calls, has none.
        if logprobs:
            self._held.append(logprobs)
        if parts and not any(isinstance(part, TextPart) for part in parts):
            self._held.clear()

    def _add(self, part: ChatPart) -> list[Event]:
        events: list[Event] = []
        if isinstance(part, ReasoningPart):
            if part.text and not isinstance(self._open, _Reasoning):
                events += self._start(_Reasoning(len(self.items) + (self._open is not None)))
        elif isinstance(part, TextPart):
            if part.text and not isinstance(self._open, _Message):
                events += self._start(self._new_message())
        elif part.name is not None or self._call != part.index:
            self._call = part.index
            index = len(self.items) + (self._open is not None)
            events += self._start(_Call(index, self._make_call_id(), part.name or ""))
        text = part.text if isinstance(part, ReasoningPart | TextPart) else part.arguments
        if text and self._open is not None:
            events += self._open.grow(text, self._take_held(part))
        return events

    def _take_held(self, part: ChatPart) -> bytes:
        if not isinstance(part, TextPart):
            return b""
        held = b",".join(self._held)
        self._held.clear()
        return held

    def _new_message(self) -> "_Message":
        return _Message(len(self.items) + (self._open is not None), logprobs=self._logprobs)

    def _start(self, item: _OpenItem) -> list[Event]:
        events = self._close("completed")
        self._open = item
        return events + item.opening()

    def _close(self, status: str) -> list[Event]:
        if self._open is None:
            return []
        events = self._open.closing(status)
        self.items.append(self._open.item(status))
        self._open = None
        return events

    def _finish(self, finish: str) -> list[Event]:
        events: list[Event] = []
        if finish in ("stop", "tool_calls"):
            self.status = "completed"
            if not self.items and self._open is None:  # the turn is there, though empty
                events += self._start(self._new_message())
        else:
            self.status = "incomplete" if finish == "length" else "failed"
        if isinstance(self._open, _Message) and self._held:
            self._open.add_logprobs(b",".join(self._held))
        return events + self._close("completed" if self.status == "completed" else "incomplete")


class _Reasoning:
    """An item of reasoning, which is open."""

    def __init__(self, index: int) -> None:
        self._index = index
        self._id = new_id("rs")
        self._texts: list[str] = []

    def opening(self) -> list[Event]:
        item = self.item("in_progress") | {"content": []}
        return [
            {"type": "response.output_item.added", "output_index": self._index, "item": item},
            {"type": "response.content_part.added", **self._place(), "part": self._part()},
        ]

    def grow(self, text: str, logprobs: bytes) -> list[Event]:
        self._texts.append(text)
        return [{"type": "response.reasoning_text.delta", **self._place(), "delta": text}]

    def closing(self, status: str) -> list[Event]:
        part = self._part()
        return [
            {"type": "response.reasoning_text.done", **self._place(), "text": part["text"]},
            {"type": "response.content_part.done", **self._place(), "part": part},
            _item_done(self._index, self.item(status)),
        ]

    def item(self, status: str) -> Item:
        return {
            "id": self._id,
            "type": "reasoning",
            "summary": [],
            "content": [self._part()],
            "status": status,
        }

    def _part(self) -> Item:
        return {"type": "reasoning_text", "text": "".join(self._texts)}

    def _place(self) -> Event:
        return {"item_id": self._id, "output_index": self._index, "content_index": 0}


class _Message:
    """A message, which is open."""

    def __init__(self, index: int, *, logprobs: bool) -> None:
        self._index = index
        self._id = new_id("msg")
        self._texts: list[str] = []
        self._logprobs: list[bytes] | None = [] if logprobs else None

    def add_logprobs(self, logprobs: bytes) -> None:
        """Adds elements of the JSON array, without text."""
        if self._logprobs is not None:
            self._logprobs.append(logprobs)

    def opening(self) -> list[Event]:
        item = self.item("in_progress") | {"content": []}
        return [
            {"type": "response.output_item.added", "output_index": self._index, "item": item},
            {"type": "response.content_part.added", **self._place(), "part": self._part()},
        ]

    def grow(self, text: str, logprobs: bytes) -> list[Event]:
        self._texts.append(text)
        if logprobs:
            self.add_logprobs(logprobs)
        event = {"type": "response.output_text.delta", **self._place(), "delta": text}
        return [event | {"logprobs": _array([logprobs] if logprobs else [])}]

    def closing(self, status: str) -> list[Event]:
        part = self._part()
        done = {"text": part["text"], "logprobs": part["logprobs"]}
        return [
            {"type": "response.output_text.done", **self._place(), **done},
            {"type": "response.content_part.done", **self._place(), "part": part},
            _item_done(self._index, self.item(status)),
        ]

    def item(self, status: str) -> Item:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": [self._part()],
        }

    def _part(self) -> Item:
        return {
            "type": "output_text",
            "text": "".join(self._texts),
            "annotations": [],
            "logprobs": _array(self._logprobs or []),
        }

    def _place(self) -> Event:
        return {"item_id": self._id, "output_index": self._index, "content_index": 0}


class _Call:
    """A call of a function, which is open."""

    def __init__(self, index: int, call_id: str, name: str) -> None:
        self._index = index
        self._id = new_id("fc")
        self._call_id = call_id
        self._name = name
        self._arguments: list[str] = []

    def opening(self) -> list[Event]:
        item = self.item("in_progress")
        return [{"type": "response.output_item.added", "output_index": self._index, "item": item}]

    def grow(self, text: str, logprobs: bytes) -> list[Event]:
        self._arguments.append(text)
        event = {"type": "response.function_call_arguments.delta", "delta": text}
        return [event | self._place()]

    def closing(self, status: str) -> list[Event]:
        item = self.item(status)
        event = {"type": "response.function_call_arguments.done", "arguments": item["arguments"]}
        return [event | self._place(), _item_done(self._index, item)]

    def item(self, status: str) -> Item:
        item = {
            "id": self._id,
            "type": "function_call",
            "call_id": self._call_id,
            "name": self._name,
            "arguments": "".join(self._arguments),
            "status": status,
        }
        if status == "completed" and call_arguments(item) is None:
            return item | {"status": "incomplete"}  # the text stopped being a call in the middle
        return item

    def _place(self) -> Event:
        return {"item_id": self._id, "output_index": self._index}


def _item_done(index: int, item: Item) -> Event:
    return {"type": "response.output_item.done", "output_index": index, "item": item}


def _array(elements: Sequence[bytes]) -> orjson.Fragment:
    return orjson.Fragment(b"[" + b",".join(elements) + b"]")
