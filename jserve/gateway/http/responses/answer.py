"""One response in the making: runs its generation and writes it, whole or as events."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import orjson

from jserve.core.errors import JserveError, Overloaded, RequestError
from jserve.gateway.conversation import PreparedChat
from jserve.gateway.http.event_stream import event
from jserve.gateway.http.openai_response import chat_logprobs
from jserve.gateway.http.responses.items import Item
from jserve.gateway.http.responses.output import Event, ResponseOutput
from jserve.gateway.metrics import GatewayMetrics
from jserve.gateway.output import OutputDelta, num_logprobs
from jserve.gateway.pauses import LARGE, Pauses
from jserve.gateway.request_plane import RequestPlane

Json = dict[str, Any]
# Called with the response's JSON and its output items once it has ended in any way.
OnEnd = Callable[[bytes, list[Item]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResponseHead:
    """Fields of a response that are known before its output."""

    id: str
    created_s: int  # Unix time
    model: str
    repeated: Json  # of the request

    def json(self, status: str, output: list[Item], **fields: Any) -> Json:
        """Makes the response."""
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created_s,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "model": self.model,
            "output": output,
            "usage": None,
            **self.repeated,
            **fields,
        }


@dataclass(slots=True, kw_only=True)
class ResponseAnswer:
    """`whole` or `events` is called once."""

    head: ResponseHead
    prepared: PreparedChat
    plane: RequestPlane
    metrics: GatewayMetrics
    on_end: OnEnd
    unix_s: Callable[[], float] = time.time
    output: ResponseOutput = field(init=False)

    def __post_init__(self) -> None:
        logprobs = self.prepared.generation.sampling.logprobs is not None
        self.output = ResponseOutput(self.prepared.call_id, logprobs=logprobs)

    async def whole(self) -> bytes:
        """Returns the complete response.

        Raises:
            JserveError: the engine refused the generation, or failed.
        """
        async with aclosing(self._steps()) as steps:
            async for _ in steps:
                pass
        return self._end(self._final())

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yields the response as server-sent events.

        An error before the engine's first output is raised; a later one is `response.failed`.
        """
        number = 0
        try:
            async with aclosing(self._steps()) as steps:
                async for found in steps:
                    if not number:
                        begun = self.head.json("in_progress", [])
                        kinds = ("response.created", "response.in_progress")
                        found = [*({"type": it, "response": begun} for it in kinds), *found]
                    for one in found:
                        yield _sent(one, number)
                        number += 1
            final = self._final()
        except JserveError as error:
            if not number:
                raise
            kind, body = "response.failed", self.fail(error)
        else:
            kind, body = f"response.{final['status']}", self._end(final)
        yield _sent({"type": kind, "response": orjson.Fragment(body)}, number)

    def fail(self, error: JserveError) -> bytes:
        """Ends the response with an error, with the output that there is; returns its JSON."""
        self.output.break_off()
        return self._end(self.head.json("failed", self.output.items, error=_error_json(error)))

    def cancel(self) -> bytes:
        """Ends the response that a client has cancelled; returns its JSON."""
        self.output.break_off()
        return self._end(self.head.json("cancelled", self.output.items))

    async def _steps(self) -> AsyncGenerator[list[Event], None]:
        """Runs the generation and yields the events of each delta, of which some have none."""
        reader, pauses = self.prepared.reader(), Pauses()
        generation = self.prepared.generation
        account = self.plane.buffers.open(generation.caller.name)
        try:
            async with aclosing(self.plane.run(generation, self.metrics, account)) as deltas:
                async for delta in deltas:
                    pauses.start()
                    read = reader.feed(delta)
                    logprobs = await self._logprobs(delta, read.reasoning_tokens)
                    account.add(len(delta.text) + len(logprobs))  # held until the end
                    events = self.output.feed(read, logprobs)
                    await pauses.end()  # a reader that was slow gets many large deltas at once
                    yield events
        finally:
            account.close()

    async def _logprobs(self, delta: OutputDelta, skipped: int) -> bytes:
        """The elements of the JSON array of a delta's log-probabilities, without the first ones."""
        if not delta.logprobs:
            return b""
        if num_logprobs(delta) > LARGE:
            async with self.plane.large_answers:
                return await asyncio.to_thread(self._encoded_logprobs, delta, skipped)
        return self._encoded_logprobs(delta, skipped)

    def _encoded_logprobs(self, delta: OutputDelta, skipped: int) -> bytes:
        entries = islice(delta.logprobs or (), skipped, None)
        return orjson.dumps(chat_logprobs(entries, self.plane.tokenizer)["content"])[1:-1]

    def _final(self) -> Json:
        output, status = self.output, self.output.status or "failed"
        details: Json = {"usage": self._usage()}
        if status == "incomplete":
            details["incomplete_details"] = {"reason": "max_output_tokens"}
        elif status == "failed":
            message = "the engine ended the generation before it was done"
            details["error"] = {"code": "server_error", "message": message}
        else:
            details["completed_at"] = int(self.unix_s())
        return self.head.json(status, output.items, **details)

    def _end(self, final: Json) -> bytes:
        encoded = orjson.dumps(final)
        self.on_end(encoded, self.output.items)
        return encoded

    def _usage(self) -> Json:
        output, num_input = self.output, len(self.prepared.generation.prompt.ids)
        return {
            "input_tokens": num_input,
            "input_tokens_details": {
                "cached_tokens": output.cached_tokens,
                "cache_write_tokens": 0,
            },
            "output_tokens": output.num_tokens,
            "output_tokens_details": {"reasoning_tokens": output.reasoning_tokens},
            "total_tokens": num_input + output.num_tokens,
        }


def _sent(one: Event, number: int) -> bytes:
    data = event({**one, "sequence_number": number})
    return f"event: {one['type']}\n".encode() + data


def _error_json(error: JserveError) -> Json:
    code = "server_error"
    if isinstance(error, Overloaded):
        code = "rate_limit_exceeded"
    elif isinstance(error, RequestError):
        code = "invalid_prompt"
    return {"code": code, "message": str(error)}
