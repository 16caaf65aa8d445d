"""One answer of the Anthropic API: runs its generation and writes it, whole or as events."""

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass

import orjson

from jserve.core.request import FinishReason
from jserve.gateway.chat_reader import ChatDelta
from jserve.gateway.conversation import PreparedChat
from jserve.gateway.http.chat_run import run_chat
from jserve.gateway.http.event_stream import StreamForm, event
from jserve.gateway.http.messages_api.blocks import BlockReader, BlockWriter, Json
from jserve.gateway.http.messages_api.request import MessagesRequest
from jserve.gateway.metrics import GatewayMetrics
from jserve.gateway.request_plane import RequestPlane


def named_event(data: Mapping[str, object]) -> bytes:
    """A server-sent event that is named by its type."""
    return b"event: %b\n" % str(data["type"]).encode() + event(data)


class MessagesStream(StreamForm):
    """Named events; the last one is message_stop, or an error."""

    keep_alive = named_event({"type": "ping"})
    end = b""

    def error(self, json: Mapping[str, object]) -> bytes:
        return named_event(json)


@dataclass(slots=True)
class _Usage:
    """Numbers of tokens so far."""

    prompt: int
    cached: int = 0
    output: int = 0
    thinking: int = 0

    def add(self, delta: ChatDelta) -> None:
        self.cached += delta.delta.cached_tokens
        self.output += len(delta.delta.token_ids)
        self.thinking += delta.reasoning_tokens

    def json(self) -> Json:
        """As Anthropic counts: `input_tokens` are those that were computed."""
        return {
            "input_tokens": self.prompt - self.cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": self.cached,
            "output_tokens": self.output,
            "output_tokens_details": {"thinking_tokens": self.thinking},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageAnswer:
    """One answer in the making; `whole` or `events` is called once."""

    asked: MessagesRequest
    prepared: PreparedChat
    model: str
    plane: RequestPlane
    metrics: GatewayMetrics

    async def whole(self) -> bytes:
        """Returns the complete message. Raises JserveError as `run_chat` does."""
        message: Json = {}
        reader = BlockReader()
        async with aclosing(self._json(kept=True)) as events:
            async for data in events:
                match data["type"]:
                    case "message_start":
                        message = data["message"]
                    case "message_delta":
                        message |= data["delta"] | {"usage": data["usage"]}
                    case _:
                        reader.feed(data)
        return orjson.dumps(message | {"content": reader.content()})

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yields the answer as server-sent events."""
        async with aclosing(self._json(kept=False)) as events:
            async for data in events:
                yield named_event(data)

    async def _json(self, *, kept: bool) -> AsyncGenerator[Json, None]:
        generation = self.prepared.generation
        usage = _Usage(len(generation.prompt.ids))
        writer = BlockWriter(
            self.prepared.call_id,
            single_call=self.asked.single_call,
            omits_thinking=self.asked.omits_thinking,
        )
        last: ChatDelta | None = None
        deltas = run_chat(self.plane, self.metrics, self.prepared, kept=kept)
        async with aclosing(deltas):
            async for delta in deltas:
                if last is None:
                    start = _Usage(usage.prompt, delta.delta.cached_tokens)
                    yield {"type": "message_start", "message": self._message(start)}
                last = delta
                usage.add(delta)
                for part in delta.parts:
                    for data in writer.feed(part):
                        yield data
                if writer.full:
                    break
        for data in writer.close():
            yield data
        assert last is not None  # a stream without a delta raises
        yield {
            "type": "message_delta",
            "delta": self._stop(last, writer),
            "usage": usage.json(),
        }
        yield {"type": "message_stop"}

    def _message(self, usage: _Usage) -> Json:
        return {
            "id": self.prepared.generation.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage.json(),
        }

    def _stop(self, last: ChatDelta, writer: BlockWriter) -> Json:
        stop, sequence = "end_turn", None
        if writer.full:
            stop = "tool_use"
        elif isinstance(last.delta.stop_reason, str):
            stop, sequence = "stop_sequence", last.delta.stop_reason
        elif last.delta.finish is FinishReason.LENGTH:
            whole = self.prepared.generation.sampling.max_tokens == self.asked.max_tokens
            stop = "max_tokens" if whole else "model_context_window_exceeded"
        elif writer.has_calls:
            stop = "tool_use"
        return {"stop_reason": stop, "stop_sequence": sequence}
