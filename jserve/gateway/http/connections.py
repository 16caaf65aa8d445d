"""HTTP connections that end when their client keeps the server waiting, and how many there are."""

import asyncio
import fcntl
import logging
import sys
import termios
import time
from typing import Any, Protocol

from starlette.types import Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from jserve.core.errors import Unavailable
from jserve.gateway.connection_limits import RESERVE, ConnectionLimits
from jserve.gateway.http.errors import HttpError, error_response
from jserve.gateway.http.upgrade import PlainHttpProtocol
from jserve.gateway.metrics import ConnectionCounts

_log = logging.getLogger(__name__)

PROBES = frozenset(("/health", "/ready"))
_BODY_BYTES_PER_S = 16 << 10  # a body may be as slow as this and get its time beside the time-out
_MAX_ENDS = 200  # connections ended in one sweep, some milliseconds
_LOG_PAUSE_S = 10.0  # between log lines about refused connections


class Connection(Protocol):
    """What the door knows of a connection."""

    def abort(self) -> None:
        """Closes it at once."""
        ...

    def end_if_late(self, now_s: float) -> bool:
        """Ends the connection if its client kept it waiting for too long; whether it did."""
        ...


class Door:
    """Knows the open connections, keeps them within limits, and logs those that it closes.

    Above `max_connections` a few more are accepted, which only probes are answered on; the oldest
    of these makes room for the next. So a probe is answered whoever else fills the server. Owned by
    the server's event loop.
    """

    def __init__(self, limits: ConnectionLimits, counts: ConnectionCounts) -> None:
        self.limits = limits
        self._counts = counts
        self._within: set[Connection] = set()  # the limit
        self._extra: dict[Connection, None] = {}  # above it, the oldest first
        self._unlogged = 0
        self._logged_s = -_LOG_PAUSE_S

    @property
    def sweep_s(self) -> float:
        """Seconds between two calls of `sweep`."""
        limits = self.limits
        shortest = min(limits.head_timeout_s, limits.body_timeout_s, limits.write_timeout_s)
        return min(1.0, shortest / 4)

    def enter(self, connection: Connection, instead_of: Connection | None = None) -> bool:
        """Takes in a connection; whether it is within the limit. Again when one above it asks.

        `instead_of` is the same connection before its TLS handshake, whose place this one takes.
        """
        self._extra.pop(connection, None)
        if instead_of is not None:
            self._within.discard(instead_of)
            self._extra.pop(instead_of, None)
        is_within = len(self._within) < self.limits.max_connections
        if is_within:
            self._within.add(connection)
        else:
            if len(self._extra) >= RESERVE:
                oldest = next(iter(self._extra))
                del self._extra[oldest]
                oldest.abort()
                self.refuse()
            self._extra[connection] = None
        self._count()
        return is_within

    def leave(self, connection: Connection) -> None:
        self._within.discard(connection)
        self._extra.pop(connection, None)
        self._count()

    def refuse(self) -> None:
        """Counts a connection for which there is no room, and says so in the log."""
        self._counts.refused += 1
        self._unlogged += 1
        now_s = time.monotonic()
        if now_s - self._logged_s < _LOG_PAUSE_S:
            return
        reason = "gateway.max_connections"
        if self.limits.lowered:
            reason = "all that the limit of open files (ulimit -n) leaves"
        _log.warning(
            "connections refused: %d; open: %d, %s", self._unlogged, len(self._within), reason
        )
        self._logged_s, self._unlogged = now_s, 0

    def sweep(self) -> bool:
        """Ends connections whose client kept the server waiting; whether all such were ended.

        It ends a bounded number, so that thousands at once do not hold up everybody else.
        """
        now_s, late = time.monotonic(), 0
        for connection in [*self._within, *self._extra]:
            late += connection.end_if_late(now_s)
            if late == _MAX_ENDS:
                break
        if late:
            self._counts.timed_out += late
            _log.info("connections closed, whose clients kept the server waiting: %d", late)
        return late < _MAX_ENDS

    def _count(self) -> None:
        self._counts.open = len(self._within) + len(self._extra)


class TimedProtocol(PlainHttpProtocol):
    """Uvicorn's protocol, without upgrades; notes since when it waits for its client."""

    def __init__(
        self, *args: Any, door: Door, handshake: Connection | None = None, **kwargs: Any
    ) -> None:
        """`handshake` is what the door knows of the connection so far, under TLS."""
        super().__init__(*args, **kwargs)
        self._door = door
        self._handshake = handshake
        self._within = True  # the limit of connections
        self._head_since_s: float | None = None  # a head is awaited
        self._head_begun = False
        self._body_since_s: float | None = None  # a body is
        self._body_bytes = 0
        self._taken_bytes = 0  # how many the client's side had taken, when that last changed
        self._taken_since_s = 0.0
        self._current: RequestResponseCycle | None = None  # the request that runs

    def connection_made(self, transport: asyncio.Transport) -> None:
        self._written = _Counted(transport)
        super().connection_made(self._written)  # pyright: ignore[reportArgumentType]
        self._head_since_s = self._taken_since_s = time.monotonic()
        self._within = self._door.enter(self, self._handshake)
        self._handshake = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._door.leave(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        # Line feeds between requests begin none, but end uvicorn's wait for the next one.
        if self._head_since_s is None and self._is_idle and self.timeout_keep_alive_task is None:
            self._head_since_s = time.monotonic()

    def on_message_begin(self) -> None:
        self._head_begun = True
        if self._head_since_s is None:
            self._head_since_s = time.monotonic()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._head_since_s, self._head_begun = None, False
        self._body_since_s, self._body_bytes = time.monotonic(), 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._body_since_s = None
        super().on_message_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._current = cycle
        if not self._within:
            self._within = self._door.enter(self)  # others may have left
        if not self._within:
            cycle.keep_alive = False
            if cycle.scope["path"] not in PROBES:
                self._door.refuse()
                app = _no_room
        super()._start_asgi_task(cycle, app)

    @property
    def _is_idle(self) -> bool:
        """Whether no request is being received or answered."""
        answered = self._current is None or self._current.response_complete
        return answered and self._body_since_s is None and not self.pipeline

    def abort(self) -> None:
        self.transport.abort()

    def end_if_late(self, now_s: float) -> bool:
        """Ends the connection if its client kept it waiting for too long; whether it did."""
        limits = self._door.limits
        if self._takes_nothing(now_s):
            self.transport.abort()
            return True
        if self.transport.is_closing():
            return False
        if self.flow.read_paused:  # it is the server that does not read
            self._head_since_s = self._head_since_s and now_s
            self._body_since_s = self._body_since_s and now_s
            self._body_bytes = 0
        if self._head_since_s is not None and now_s - self._head_since_s > limits.head_timeout_s:
            return self._end("head", answers=self._head_begun)
        if self._body_since_s is not None:
            allowed_s = limits.body_timeout_s + self._body_bytes / _BODY_BYTES_PER_S
            if now_s - self._body_since_s > allowed_s:
                return self._end("body", answers=not self.cycle.response_started)
        return False

    def _takes_nothing(self, now_s: float) -> bool:
        """Whether bytes have waited for the client, without any progress, for too long."""
        waiting = self.transport.get_write_buffer_size()
        taken = self._written.count - waiting - (self._in_system() if waiting else 0)
        if not waiting or taken != self._taken_bytes:
            self._taken_bytes, self._taken_since_s = taken, now_s
        return now_s - self._taken_since_s > self._door.limits.write_timeout_s

    def _in_system(self) -> int:
        """Bytes in the system's send buffer, which takes more only when a third of it is free."""
        handle = self.transport.get_extra_info("socket").fileno()
        try:
            packed = fcntl.ioctl(handle, termios.TIOCOUTQ, bytes(4))
        except OSError:  # closed
            return 0
        return int.from_bytes(packed, sys.byteorder)

    def _end(self, part: str, *, answers: bool) -> bool:
        """Closes the connection, with a 408 if a request has begun; whether it was closed.

        An answer to an earlier request of the connection is finished first.
        """
        earlier = self._current
        if part == "body" and earlier is self.cycle:
            earlier = None  # the late one itself
        if earlier is not None and not earlier.response_complete:
            earlier.keep_alive = False
            self._head_since_s = self._body_since_s = None
            return False
        if answers:
            self.transport.write(_timeout_answer(part))
        self.transport.close()
        return True


class _Counted:
    """A transport that counts the bytes written to it."""

    __slots__ = ("_transport", "count")

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self.count = 0

    def write(self, data: bytes) -> None:
        self.count += len(data)
        self._transport.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


async def _no_room(scope: Scope, receive: Receive, send: Send) -> None:
    error = Unavailable("the server has as many connections as it takes", retry_after_s=1.0)
    await error_response(error, scope)(scope, receive, send)


def _timeout_answer(part: str) -> bytes:
    error = HttpError(408, f"the {part} of the request did not come in time", code="timeout")
    response = error_response(error)
    headers = [*response.raw_headers, (b"connection", b"close")]
    lines = [b"HTTP/1.1 408 Request Timeout", *(b"%b: %b" % header for header in headers), b""]
    return b"\r\n".join([*lines, bytes(response.body)])
