"""A lean HTTP/1.1 client for streams of events: one process can read thousands of them.

Raw asyncio protocols and httptools' parser; connections are kept and used again.
"""

import asyncio
import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast
from urllib.parse import urlsplit

import httptools

from benchmarks.serving.failures import BenchmarkError, RequestFailed
from benchmarks.serving.sse import EventParser

OnEvent = Callable[[bytes, float], None]  # data of an event, and when its bytes came
_MAX_BODY_BYTES = 1 << 20  # most bytes kept of an answer that is not a stream


class CannotConnect(RequestFailed):
    """Nobody listens there."""


class HttpFailure(RequestFailed):
    """An answer with a status other than 200."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(f"HTTP {status}: {_message(body)}")
        self.status = status


class NotEventStream(RequestFailed):
    """An answer that is no stream of events."""


class _Stale(Exception):
    """A kept connection was closed by the server before it answered anything."""


@dataclass(slots=True)
class Answer:
    """An answer as it comes in; httptools calls its methods. Owned by one connection."""

    on_event: OnEvent | None  # None: the body is wanted whole
    done: asyncio.Future[None]
    status: int = 0
    content_type: str = ""
    body: bytearray = field(default_factory=bytearray)
    now_s: float = 0.0  # when the bytes that are being parsed came
    has_begun: bool = False
    has_head: bool = False
    ends_with_connection: bool = True
    is_kept: bool = False  # the connection can take another request
    parser: httptools.HttpResponseParser = field(init=False)
    _events: EventParser | None = None

    def __post_init__(self) -> None:
        """Makes the parser, which calls back."""
        self.parser = httptools.HttpResponseParser(self)

    def feed(self, data: bytes) -> None:
        """Takes more bytes of the answer."""
        self.has_begun = True
        self.now_s = time.perf_counter()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError as error:
            cause = error.__context__ if isinstance(error.__context__, RequestFailed) else None
            self.fail(cause or RequestFailed(f"not an HTTP answer: {error}"))

    def end_of_connection(self) -> None:
        """Ends the answer: no more bytes will come."""
        if self.has_head and self.ends_with_connection:
            self.on_message_complete()
        elif self.has_begun:
            self.fail(RequestFailed("the server closed the connection in the middle of an answer"))
        else:
            self.fail(_Stale())

    def fail(self, error: Exception) -> None:
        """Ends the wait for the answer."""
        if not self.done.done():
            self.done.set_exception(error)

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        if name == b"content-type":
            self.content_type = value.decode("latin-1").partition(";")[0].strip().lower()
        elif name in (b"content-length", b"transfer-encoding"):
            self.ends_with_connection = False

    def on_headers_complete(self) -> None:
        self.status = self.parser.get_status_code()
        self.has_head = self.status >= 200  # below is a 100 Continue
        if self.on_event and self.status == 200 and self.content_type == "text/event-stream":
            self._events = EventParser()

    def on_body(self, data: bytes) -> None:
        if self._events is None or self.on_event is None:
            self.body += data[: _MAX_BODY_BYTES - len(self.body)]
            return
        for event in self._events.feed(data):
            self.on_event(event, self.now_s)

    def on_message_complete(self) -> None:
        if self.has_head and not self.done.done():
            # Asked for here, since the parser forgets it with the message.
            self.is_kept = not self.ends_with_connection and self.parser.should_keep_alive()
            self.done.set_result(None)


class _Connection(asyncio.Protocol):
    """A socket; one exchange at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._answer: Answer | None = None

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    async def exchange(self, request: bytes, on_event: OnEvent | None) -> Answer:
        """Sends a request and returns its complete answer. Raises RequestFailed or _Stale."""
        assert self._transport is not None
        answer = Answer(on_event, asyncio.get_running_loop().create_future())
        self._answer = answer
        try:
            self._transport.write(request)
            await answer.done
        except BaseException:
            self.close()
            raise
        finally:
            self._answer = None
        return answer

    def close(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass of it

    def data_received(self, data: bytes) -> None:
        if self._answer is not None:
            self._answer.feed(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._answer is not None:
            self._answer.end_of_connection()


class HttpClient:
    """Talks to one server. Owned by one event loop."""

    def __init__(self, url: str, *, api_key: str | None = None) -> None:
        """`url` is the root of the server, with or without a last /v1."""
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise BenchmarkError(f"--url {url!r} is not a URL like http://127.0.0.1:8000")
        self.url = url.rstrip("/").removesuffix("/v1")
        self._host = parts.hostname
        self._tls = parts.scheme == "https"
        try:
            self._port = parts.port or (443 if self._tls else 80)
        except ValueError as error:
            raise BenchmarkError(f"--url {url!r}: {error}") from None
        self._prefix = parts.path.rstrip("/").removesuffix("/v1")
        self._head = f"host: {parts.netloc.rpartition('@')[2]}\r\naccept: */*\r\n"
        if api_key:
            self._head += f"authorization: Bearer {api_key}\r\n"
        self._idle: list[_Connection] = []

    async def get(self, path: str) -> bytes:
        """The body of a GET. Raises RequestFailed."""
        head = f"GET {self._prefix}{path} HTTP/1.1\r\n{self._head}\r\n"
        answer = await self._exchange(head.encode(), None)
        if answer.status != 200:
            raise HttpFailure(answer.status, bytes(answer.body))
        return bytes(answer.body)

    def encode(self, path: str, body: bytes) -> bytes:
        """The bytes of a POST of JSON, for `stream`."""
        head = (
            f"POST {self._prefix}{path} HTTP/1.1\r\n{self._head}"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body

    async def stream(self, request: bytes, on_event: OnEvent) -> None:
        """Sends what `encode` made and gives every event to `on_event`, until the stream ends.

        Raises RequestFailed; `on_event` may raise it, too.
        """
        answer = await self._exchange(request, on_event)
        if answer.status != 200:
            raise HttpFailure(answer.status, bytes(answer.body))
        if answer.content_type != "text/event-stream":
            raise NotEventStream(
                f"the answer is {answer.content_type or 'of no type'}, not text/event-stream"
            )

    def close(self) -> None:
        """Drops the idle connections."""
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    async def _exchange(self, request: bytes, on_event: OnEvent | None) -> Answer:
        while True:
            connection = self._take()
            is_used = connection is not None
            if connection is None:
                connection = await self._connect()
            try:
                answer = await connection.exchange(request, on_event)
            except _Stale:
                if is_used:
                    continue
                message = "the server closed the connection without an answer"
                raise RequestFailed(message) from None
            if answer.is_kept:
                self._idle.append(connection)
            else:
                connection.close()
            return answer

    def _take(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                return connection
        return None

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_connection(
                _Connection, self._host, self._port, ssl=self._tls or None
            )
        except OSError as error:
            raise CannotConnect(
                f"cannot connect to {self._host}:{self._port} ({_reason(error)})"
            ) from None
        return connection


def _reason(error: OSError) -> str:
    if error.errno is not None and error.errno > 0 and not isinstance(error, socket.gaierror):
        return os.strerror(error.errno)
    return error.strerror or str(error)


def _message(body: bytes) -> str:
    """Message of an error: OpenAI's, FastAPI's or llama.cpp's field, or the text."""
    try:
        fields: Any = json.loads(body)
    except ValueError:
        fields = None
    for key in ("error", "message", "detail"):
        if isinstance(fields, Mapping) and key in fields:
            fields = fields[key]
    text = fields if isinstance(fields, str) else body.decode("utf-8", "replace")
    return " ".join(text.split())[:300] or "no explanation"
