"""One answer of the Ollama API: runs its generation and writes it, whole or as lines of JSON."""

import datetime
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

import orjson

from jserve.core.request import FinishReason
from jserve.gateway.chat_reader import ChatPart
from jserve.gateway.conversation import PreparedChat
from jserve.gateway.http.chat_run import run_chat
from jserve.gateway.http.event_stream import StreamForm
from jserve.gateway.metrics import GatewayMetrics
from jserve.gateway.output import OutputDelta
from jserve.gateway.reasoning.format import ReasoningPart
from jserve.gateway.request_plane import RequestPlane
from jserve.gateway.tools.format import CallPart, TextPart

Json = dict[str, Any]


class LineStream(StreamForm):
    """Lines of JSON; the last one is done, or an error. An empty line would be no JSON."""

    content_type = b"application/x-ndjson"
    keep_alive = b""
    end = b""

    def error(self, json: Mapping[str, object]) -> bytes:
        return json_line(json)


def json_line(json: Mapping[str, object]) -> bytes:
    return orjson.dumps(json, option=orjson.OPT_APPEND_NEWLINE)


@dataclass(frozen=True, slots=True)
class Piece:
    """The next piece of an answer."""

    text: str = ""
    thinking: str = ""
    calls: Sequence[Json] = ()


Shape = Callable[[Piece], Json]  # fields of an object that has a piece


def chat_shape(piece: Piece) -> Json:
    """The piece as /api/chat has it."""
    message: Json = {"role": "assistant", "content": piece.text}
    if piece.thinking:
        message["thinking"] = piece.thinking
    if piece.calls:
        message["tool_calls"] = list(piece.calls)
    return {"message": message}


def generate_shape(piece: Piece) -> Json:
    """The piece as /api/generate has it."""
    thinking = {"thinking": piece.thinking} if piece.thinking else {}
    return {"response": piece.text, **thinking}


@dataclass(frozen=True, slots=True)
class Head:
    """Fields that every object of one answer begins with."""

    model: str
    unix_s: Callable[[], float]

    def json(self, *, done: bool) -> Json:
        now = datetime.datetime.fromtimestamp(self.unix_s(), datetime.UTC)
        created = now.isoformat(timespec="microseconds").replace("+00:00", "Z")
        return {"model": self.model, "created_at": created, "done": done}


@dataclass(slots=True)
class _Times:
    """What Ollama tells at the end: numbers of tokens, and durations in nanoseconds."""

    prompt_tokens: int
    start_s: float
    first_s: float | None = None
    prompt_s: float = 0.0
    tokens: int = 0

    def add(self, delta: OutputDelta, now_s: float) -> None:
        if self.first_s is None:
            self.first_s = now_s
            self.prompt_s = (delta.ttft_s or 0.0) - (delta.queue_s or 0.0)
        self.tokens += len(delta.token_ids)

    def json(self, now_s: float) -> Json:
        decode_s = now_s - (self.first_s or now_s)
        return {
            "total_duration": _ns(now_s - self.start_s),
            "load_duration": 0,
            "prompt_eval_count": self.prompt_tokens,
            "prompt_eval_duration": _ns(self.prompt_s),
            "eval_count": self.tokens,
            "eval_duration": _ns(decode_s),
        }


def _ns(seconds: float) -> int:
    return max(1, round(seconds * 1e9))  # clients divide by it


@dataclass(slots=True)
class _Calls:
    """Joins the parts of calls: Ollama gives each out once it is whole."""

    make_id: Callable[[], str]
    done: int = 0
    _index: int = -1
    _name: str = ""
    _pieces: list[str] = field(default_factory=list[str])

    def feed(self, part: CallPart) -> list[Json]:
        """Returns the call before that of this part, if this is the first of another one."""
        calls: list[Json] = []
        if part.index != self._index:
            calls = self.close()
            self._index, self._name = part.index, part.name or ""
        self._pieces.append(part.arguments)
        return calls

    def close(self) -> list[Json]:
        """Returns the last call; none if there is none, or if it was cut off."""
        if self._index < 0:
            return []
        text, self._pieces, self._index = "".join(self._pieces), [], -1
        try:
            arguments = orjson.loads(text)
        except orjson.JSONDecodeError:
            return []
        function = {"index": self.done, "name": self._name, "arguments": arguments}
        self.done += 1
        return [{"id": self.make_id(), "function": function}]


@dataclass(frozen=True, slots=True, kw_only=True)
class OllamaAnswer:
    """One answer in the making; `whole` or `lines` is called once."""

    prepared: PreparedChat
    head: Head
    shape: Shape
    plane: RequestPlane
    metrics: GatewayMetrics
    start_s: float  # of the plane's clock, when the request came

    async def whole(self) -> bytes:
        """Returns the complete object. Raises JserveError as `run_chat` does."""
        pieces: list[Piece] = []
        final: Json = {}
        async with aclosing(self._pieces(kept=True)) as found:
            async for item in found:
                if isinstance(item, Piece):
                    pieces.append(item)
                else:
                    final = item
        joined = Piece(
            "".join(piece.text for piece in pieces),
            "".join(piece.thinking for piece in pieces),
            [call for piece in pieces for call in piece.calls],
        )
        return orjson.dumps(self.head.json(done=True) | self.shape(joined) | final)

    async def lines(self) -> AsyncGenerator[bytes, None]:
        """Yields the answer as lines of JSON."""
        async with aclosing(self._pieces(kept=False)) as found:
            async for item in found:
                if isinstance(item, Piece):
                    yield json_line(self.head.json(done=False) | self.shape(item))
                else:
                    yield json_line(self.head.json(done=True) | self.shape(Piece()) | item)

    async def _pieces(self, *, kept: bool) -> AsyncGenerator[Piece | Json, None]:
        """Yields pieces, and at the end the fields that tell how it went."""
        clock, generation = self.plane.clock, self.prepared.generation
        times = _Times(len(generation.prompt.ids), self.start_s)
        calls = _Calls(self.prepared.call_id)
        reason = "stop"
        deltas = run_chat(self.plane, self.metrics, self.prepared, kept=kept)
        async with aclosing(deltas):
            async for delta in deltas:
                times.add(delta.delta, clock.now_s())
                piece = _piece(delta.parts, calls, last=delta.finish is not None)
                if piece != Piece():
                    yield piece
                if delta.delta.finish is FinishReason.LENGTH:
                    reason = "length"
        yield {"done_reason": reason, **times.json(clock.now_s())}


def _piece(parts: Sequence[ChatPart], calls: _Calls, *, last: bool) -> Piece:
    texts: list[str] = []
    thoughts: list[str] = []
    whole: list[Json] = []
    for part in parts:
        match part:
            case CallPart():
                whole += calls.feed(part)
            case TextPart(text):
                whole += calls.close()
                texts.append(text)
            case ReasoningPart(text):
                whole += calls.close()
                thoughts.append(text)
    if last:
        whole += calls.close()
    return Piece("".join(texts), "".join(thoughts), tuple(whole))
