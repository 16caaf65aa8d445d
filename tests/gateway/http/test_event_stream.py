"""Streams over a scripted ASGI server: their bytes, their end, their buffers."""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

import pytest
from starlette.types import Message

from jserve.core.errors import EngineError, JserveError, Overloaded
from jserve.gateway.http.event_stream import (
    _PIECE_BYTES,
    ClientGone,
    EventStream,
    event,
    unless_disconnected,
)


class Connection:
    """One ASGI exchange; `gone` is the client's leaving."""

    def __init__(self) -> None:
        self.sent: list[Message] = []
        self.gone = asyncio.Event()
        self.readable = asyncio.Event()
        self.readable.set()

    async def receive(self) -> Message:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        await self.readable.wait()
        self.sent.append(message)

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)

    async def run(self, stream: EventStream) -> None:
        scope = {"type": "http", "path": "/v1/completions"}
        await asyncio.wait_for(stream(scope, self.receive, self.send), 5)


class Source:
    """Events from a script of bytes, waits in seconds, and errors; knows if it was closed."""

    def __init__(self, *script: bytes | float | JserveError) -> None:
        self.script = script
        self.given = 0
        self.closed = False

    async def events(self) -> AsyncGenerator[bytes, None]:
        try:
            for item in self.script:
                match item:
                    case bytes():
                        self.given += 1
                        yield item
                    case float():
                        await asyncio.sleep(item)
                    case _:
                        raise item
        finally:
            self.closed = True


def run(
    source: Source,
    *,
    keep_alive_s: float = 60.0,
    meanwhile: Callable[[Connection], Awaitable[None]] | None = None,
) -> Connection:
    async def main() -> Connection:
        connection = Connection()
        stream = EventStream(source.events(), keep_alive_s=keep_alive_s)
        others = [] if meanwhile is None else [meanwhile(connection)]
        await asyncio.gather(connection.run(stream), *others)
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left
        return connection

    return asyncio.run(main())


def test_events_then_done() -> None:
    connection = run(Source(b"data: 1\n\n", b"data: 2\n\n"))
    assert connection.body == b"data: 1\n\ndata: 2\n\ndata: [DONE]\n\n"
    assert [message["type"] for message in connection.sent].count("http.response.start") == 1
    assert connection.sent[0]["status"] == 200
    assert connection.sent[-1]["more_body"] is False


def test_an_error_before_the_first_event_keeps_its_status() -> None:
    connection = run(Source(Overloaded("full", retry_after_s=2.5)))
    assert connection.sent[0]["status"] == 429
    assert dict(connection.sent[0]["headers"])[b"retry-after"] == b"3"
    assert json.loads(connection.body)["error"]["message"] == "full"


def test_an_error_after_it_is_an_event() -> None:
    connection = run(Source(b"data: 1\n\n", EngineError("died")))
    first, error, done, rest = connection.body.split(b"\n\n")
    assert (first, done, rest) == (b"data: 1", b"data: [DONE]", b"")
    assert json.loads(error.removeprefix(b"data: "))["error"]["message"] == "died"


def test_silence_is_filled_with_comments() -> None:
    connection = run(Source(0.2, b"data: 1\n\n", 0.2), keep_alive_s=0.05)
    before, after = connection.body.split(b"data: 1\n\n")
    assert 1 <= before.count(b": keep-alive\n\n") <= 5
    assert 1 <= after.count(b": keep-alive\n\n") <= 5
    # An error that comes so late can only be an event.
    connection = run(Source(0.1, Overloaded("full", retry_after_s=1.0)), keep_alive_s=0.03)
    assert connection.sent[0]["status"] == 200
    assert b'"type":"rate_limit_error"' in connection.body


@pytest.mark.parametrize("script", [(60.0,), (b"data: 1\n\n", 60.0)])
def test_a_client_that_leaves_closes_the_source(script: tuple[bytes | float, ...]) -> None:
    async def leave(connection: Connection) -> None:
        await asyncio.sleep(0.02)
        connection.gone.set()

    source = Source(*script)
    connection = run(source, meanwhile=leave)
    assert source.closed
    assert b"[DONE]" not in connection.body


def test_a_slow_reader_holds_the_source_back_and_may_leave() -> None:
    source = Source(*[b"data: 1\n\n"] * 1000)

    async def stall(connection: Connection) -> None:
        connection.readable.clear()
        await asyncio.sleep(0.1)  # comments would be due, too
        assert source.given == 1
        assert not source.closed
        connection.gone.set()

    run(source, keep_alive_s=0.02, meanwhile=stall)
    assert source.closed


def test_bugs_surface() -> None:
    async def events() -> AsyncGenerator[bytes, None]:
        yield b"data: 1\n\n"
        raise ZeroDivisionError

    async def main() -> None:
        with pytest.raises(ZeroDivisionError):
            await Connection().run(EventStream(events(), keep_alive_s=1.0))

    asyncio.run(main())


@pytest.mark.parametrize(
    "text", ["a\nb\r\nc", "\u2028 \u2029 \x85 \u00e2\u0080", "é🙂\x00\x1f\x7f"]
)
def test_an_event_is_one_line_however_lines_are_split(text: str) -> None:
    data = event({"text": text})
    lines = data.decode().splitlines()
    assert lines[1:] == [""]
    assert json.loads(lines[0].removeprefix("data: ")) == {"text": text}


def test_work_ends_with_the_client() -> None:
    async def main() -> None:
        connection = Connection()
        assert await unless_disconnected(connection.receive, _value(5)) == 5
        with pytest.raises(EngineError):
            await unless_disconnected(connection.receive, _failure())
        forever: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_later(0.02, connection.gone.set)
        with pytest.raises(ClientGone):
            await unless_disconnected(connection.receive, _wait(forever))
        assert forever.cancelled()

    asyncio.run(main())


async def _value(value: int) -> int:
    return value


async def _failure() -> None:
    raise EngineError("no")


async def _wait(future: asyncio.Future[Any]) -> None:
    await future


@pytest.mark.parametrize("shift", range(3))
def test_a_long_event_is_escaped_wherever_its_pieces_end(shift):
    """Characters of two and three bytes lie across the ends of the pieces."""
    text = "x" * shift + "\u2028\u0085é" * (_PIECE_BYTES // 3)
    written = event({"text": text})
    assert written.startswith(b"data: {")
    assert written.endswith(b"}\n\n")
    assert len(written.decode().splitlines()) == 2
    assert json.loads(written[6:]) == {"text": text}


def test_a_long_event_is_sent_in_pieces_that_no_comment_divides():
    long = b"data: " + b"x" * (3 * _PIECE_BYTES) + b"\n\n"
    connection = run(Source(b"data: 1\n\n", 0.05, long), keep_alive_s=0.01)
    assert long in connection.body
    sizes = [len(message.get("body", b"")) for message in connection.sent]
    assert max(sizes) == _PIECE_BYTES
    assert sizes.count(_PIECE_BYTES) == len(long) // _PIECE_BYTES
    assert b": keep-alive" in connection.body
