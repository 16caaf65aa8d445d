"""Parts of an answer → content blocks of the Anthropic API and their events."""

from collections.abc import Callable
from typing import Any

import orjson

from jserve.gateway.chat_reader import ChatPart
from jserve.gateway.reasoning.format import ReasoningPart
from jserve.gateway.tools.format import CallPart, TextPart

Json = dict[str, Any]

# Blocks of thinking need one. It is opaque to clients, and nothing here checks it.
_SIGNATURE = "unsigned"
# The field of each kind of delta, which is the one that its block's text has as well.
_TEXT_FIELDS = {
    "text_delta": "text",
    "thinking_delta": "thinking",
    "input_json_delta": "partial_json",
    "signature_delta": "signature",
}


class BlockWriter:
    """Writes the events of an answer's blocks, of which one at a time is open.

    Owned by one answer.
    """

    def __init__(
        self, call_id: Callable[[], str], *, single_call: bool, omits_thinking: bool
    ) -> None:
        """With `single_call` everything from the second call on is left out."""
        self._call_id = call_id
        self._single_call = single_call
        self._omits_thinking = omits_thinking
        self._index = -1
        self._open: str | None = None  # type of the open block
        self._call = -1
        self.full = False  # the answer is over, whatever else comes

    @property
    def has_calls(self) -> bool:
        return self._call >= 0

    def feed(self, part: ChatPart) -> list[Json]:
        """Returns the events of the next part."""
        if isinstance(part, CallPart):
            self.full |= self._single_call and part.index > 0
        if self.full:
            return []
        match part:
            case TextPart(text):
                return self._write("text", {"text": ""}, "text_delta", text) if text else []
            case ReasoningPart(text):
                shown = "" if self._omits_thinking else text
                start = {"thinking": "", "signature": ""}
                return self._write("thinking", start, "thinking_delta", shown)
            case CallPart(index, name, arguments):
                if index != self._call:
                    self._call = index
                    events = self.close()
                    start = {"id": self._call_id(), "name": name, "input": {}}
                else:
                    events, start = [], {}
                return events + self._write("tool_use", start, "input_json_delta", arguments)

    def close(self) -> list[Json]:
        """Returns the events that end the open block, if there is one."""
        if self._open is None:
            return []
        kind, self._open = self._open, None
        events = [self._delta("signature_delta", _SIGNATURE)] if kind == "thinking" else []
        return [*events, {"type": "content_block_stop", "index": self._index}]

    def _write(self, kind: str, start: Json, delta: str, text: str) -> list[Json]:
        events: list[Json] = []
        if self._open != kind:
            events += self.close()
            self._open = kind
            self._index += 1
            block = {"type": kind, **start}
            events.append(
                {"type": "content_block_start", "index": self._index, "content_block": block}
            )
        if text:
            events.append(self._delta(delta, text))
        return events

    def _delta(self, kind: str, text: str) -> Json:
        delta = {"type": kind, _TEXT_FIELDS[kind]: text}
        return {"type": "content_block_delta", "index": self._index, "delta": delta}


class BlockReader:
    """Joins the events of blocks to whole blocks. Owned by one answer."""

    def __init__(self) -> None:
        self._blocks: list[Json] = []
        self._texts: list[dict[str, list[str]]] = []  # by block and field

    def feed(self, event: Json) -> None:
        match event["type"]:
            case "content_block_start":
                self._blocks.append(dict(event["content_block"]))
                self._texts.append({})
            case "content_block_delta":
                delta = event["delta"]
                field = _TEXT_FIELDS[delta["type"]]
                self._texts[-1].setdefault(field, []).append(delta[field])

    def content(self) -> list[Json]:
        """Returns the blocks. The input of a call that was cut off is empty."""
        for block, texts in zip(self._blocks, self._texts, strict=True):
            for field, pieces in texts.items():
                text = "".join(pieces)
                if field == "partial_json":
                    block["input"] = _arguments(text)
                else:
                    block[field] = text
        return self._blocks


def _arguments(text: str) -> Json:
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}
