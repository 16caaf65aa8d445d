"""Streamed answers over ASGI: framing, keep-alive, back-pressure, abort when the client leaves."""

import asyncio
import time
from collections.abc import AsyncGenerator, Coroutine, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from jserve.core.errors import JserveError
from jserve.gateway.http.errors import error_json, error_response
from jserve.gateway.http.long_list import REST_S

T = TypeVar("T")

_PIECE_BYTES = 256 << 10  # of a long event; as many take less than a millisecond
DONE = b"data: [DONE]\n\n"
_FIRST = asyncio.FIRST_COMPLETED
_KEEP_ALIVE = b": keep-alive\n\n"
_HEADERS = [
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would buffer events
]
EVENT_STREAM = b"text/event-stream; charset=utf-8"


class ClientGone(Exception):
    """The client closed the connection; there is nobody to answer."""


def event(data: object) -> bytes:
    """One event. U+0085, U+2028 and U+2029 are escaped: some clients split lines at them.

    A long one is escaped in pieces, between which other threads get the interpreter's lock.
    """
    body = orjson.dumps(data)
    if len(body) <= _PIECE_BYTES:
        return b"data: " + _escaped(body) + b"\n\n"
    parts, start = [b"data: "], 0
    while start < len(body):
        end = start + _PIECE_BYTES
        while end < len(body) and body[end] & 0xC0 == 0x80:  # a character is in one piece
            end += 1
        parts.append(_escaped(body[start:end]))
        start = end
        time.sleep(REST_S)
    return b"".join([*parts, b"\n\n"])


class StreamForm:
    """How one API frames a stream, here OpenAI's: server-sent events that end with `[DONE]`."""

    content_type = EVENT_STREAM
    keep_alive = _KEEP_ALIVE  # sent while there is nothing else; empty: nothing is
    end = DONE

    def error(self, json: Mapping[str, object]) -> bytes:
        """Frames the error that ends a stream; `end` follows it."""
        return event(json)


OPENAI_STREAM = StreamForm()


def _escaped(json: bytes) -> bytes:
    if not json.isascii() and (b"\xe2\x80" in json or b"\xc2\x85" in json):
        json = (
            json.replace(b"\xe2\x80\xa8", b"\\u2028")
            .replace(b"\xe2\x80\xa9", b"\\u2029")
            .replace(b"\xc2\x85", b"\\u0085")
        )
    return json


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client leaves.

    Raises:
        ClientGone: it left.
    """
    working = asyncio.create_task(work)
    watching = asyncio.create_task(_disconnect(receive))
    try:
        await asyncio.wait((working, watching), return_when=_FIRST)
    finally:
        if not working.done():
            working.cancel()
        watching.cancel()
        await asyncio.wait((working, watching))
    if working.cancelled():
        raise ClientGone
    return working.result()


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends `events`, each already encoded, as they come, and what ends a stream of this form.

    The response starts with the first event, so an error before it keeps its HTTP status; or after
    `keep_alive_s`, with a comment that repeats while nothing else is sent. A later error is an
    event. `events` is closed when the client leaves. A slow reader stops it at one event: the
    buffers are the socket's.
    """

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        *,
        keep_alive_s: float,
        form: StreamForm = OPENAI_STREAM,
    ) -> None:
        super().__init__()
        self._events = events
        self._form = form
        self._keep_alive_s = keep_alive_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Runs the stream to its end, or until the client leaves."""
        writer = _Writer(scope, receive, send, self._form)
        pumping = asyncio.create_task(self._pump(writer))
        gone = asyncio.create_task(_disconnect(receive))
        try:
            await self._keep_alive(writer, (pumping, gone))
        finally:
            if not pumping.done():
                pumping.cancel()
            gone.cancel()
            await asyncio.wait((pumping, gone))
        if not pumping.cancelled():
            pumping.result()  # a bug surfaces

    async def _pump(self, writer: "_Writer") -> None:
        try:
            async with aclosing(self._events) as events:
                async for data in events:
                    await writer.write(data)
        except JserveError as error:
            await writer.fail(error)
        else:
            await writer.end()

    async def _keep_alive(self, writer: "_Writer", until: tuple[asyncio.Task[None], ...]) -> None:
        wait_s = self._keep_alive_s
        while not (await asyncio.wait(until, timeout=wait_s, return_when=_FIRST))[0]:
            wait_s = self._keep_alive_s - writer.idle_s
            if wait_s <= 0:
                await writer.keep_alive()
                wait_s = self._keep_alive_s


class _Writer:
    """The response's messages, whole and in order, from two tasks. Owned by one EventStream."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, form: StreamForm) -> None:
        self._form = form
        self._scope = scope
        self._receive = receive
        self._send = send
        self._lock = asyncio.Lock()
        self._loop = asyncio.get_running_loop()
        self._started = False
        self._ended = False
        self._last_write_s = self._loop.time()

    @property
    def idle_s(self) -> float:
        return self._loop.time() - self._last_write_s

    async def keep_alive(self) -> None:
        if not self._form.keep_alive:
            self._last_write_s = self._loop.time()
        elif not self._lock.locked():  # a pending write already keeps the connection alive
            await self.write(self._form.keep_alive)

    async def write(self, data: bytes) -> None:
        async with self._lock:
            await self._body(data, more=True)

    async def end(self) -> None:
        async with self._lock:
            await self._body(self._form.end, more=False)

    async def fail(self, error: JserveError) -> None:
        async with self._lock:
            if self._started:
                data = self._form.error(error_json(error, self._scope))
                await self._body(data + self._form.end, more=False)
            else:
                self._ended = True
                await error_response(error, self._scope)(self._scope, self._receive, self._send)

    async def _body(self, data: bytes, *, more: bool) -> None:
        if self._ended:
            return
        if not self._started:
            self._started = True
            headers = [(b"content-type", self._form.content_type), *_HEADERS]
            start = {"type": "http.response.start", "status": 200, "headers": headers}
            await self._send(start)
        self._ended = not more
        if len(data) > _PIECE_BYTES:
            data = await self._all_but_last_piece(data)
        await self._send({"type": "http.response.body", "body": data, "more_body": more})
        self._last_write_s = self._loop.time()

    async def _all_but_last_piece(self, data: bytes) -> bytes:
        """Sends long data in pieces; returns the last one, which is left."""
        last = (len(data) - 1) // _PIECE_BYTES * _PIECE_BYTES
        for start in range(0, last, _PIECE_BYTES):
            piece = data[start : start + _PIECE_BYTES]
            await self._send({"type": "http.response.body", "body": piece, "more_body": True})
            await asyncio.sleep(0)
        return data[last:]
