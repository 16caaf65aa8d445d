"""Accepts HTTPS connections, which count among the open ones from before their TLS handshake.

A server of asyncio makes a protocol only after the handshake, so clients that never begin theirs
would be bounded by nothing but the number of descriptors.
"""

import asyncio
import contextlib
import socket
import ssl
import time
from collections.abc import Callable, Coroutine
from typing import Any

from jserve.gateway.http.connections import Door

_MOST_AT_ONCE = 16  # connections accepted before the event loop serves others
_PAUSE_S = 0.5  # without accepting, where descriptors have run out
_BACKSTOP = 2.0  # asyncio's own time-out, in those of the door, whose sweep comes first


class Handshake:
    """A connection that has not ended its TLS handshake."""

    def __init__(self, door: Door, raw: socket.socket) -> None:
        self._door = door
        self.raw = raw
        self._since_s = time.monotonic()
        self._begun = False  # the socket is a transport's
        self._ended = False
        self._task: asyncio.Task[None] | None = None
        door.enter(self)

    def start(self, work: Callable[["Handshake"], Coroutine[Any, Any, None]]) -> asyncio.Task[None]:
        """Runs `work`, with which the handshake ends; then it leaves the door."""

        async def run() -> None:
            self._begun = True
            await work(self)

        def end(_: asyncio.Task[None]) -> None:
            if not self._begun:  # aborted before its first step
                self.raw.close()
            self._door.leave(self)

        self._task = asyncio.create_task(run())
        self._task.add_done_callback(end)
        return self._task

    def abort(self) -> None:
        self._ended = True
        if self._task is not None:
            self._task.cancel()

    def end_if_late(self, now_s: float) -> bool:
        """Ends the connection if the handshake takes too long; whether it did."""
        if self._ended or now_s - self._since_s <= self._door.limits.head_timeout_s:
            return False
        self.abort()
        return True


class TlsListener:
    """Listens from construction to `close`, as a server of asyncio does."""

    def __init__(
        self,
        listener: socket.socket,
        context: ssl.SSLContext,
        door: Door,
        make_protocol: Callable[[Handshake], asyncio.Protocol],
        *,
        backlog: int,
    ) -> None:
        """`make_protocol` makes what replaces a handshake; `listener` is bound, not blocking."""
        self._listener = listener
        self._context = context
        self._door = door
        self._make_protocol = make_protocol
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()  # handshakes
        self._closed = False
        listener.listen(backlog)
        self._resume()

    def close(self) -> None:
        """Accepts no more and ends the handshakes; connections after theirs stay."""
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._listener)
            for task in self._tasks:
                task.cancel()

    async def wait_closed(self) -> None:
        """Returns when no handshake is left."""
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _resume(self) -> None:
        if not self._closed:
            self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        for _ in range(_MOST_AT_ONCE):
            try:
                raw, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError:  # no descriptor or no memory is left
                self._door.refuse()
                self._loop.remove_reader(self._listener)
                self._loop.call_later(_PAUSE_S, self._resume)
                return
            raw.setblocking(False)
            task = Handshake(self._door, raw).start(self._shake)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _shake(self, handshake: Handshake) -> None:
        with contextlib.suppress(OSError):  # the client left, or does not speak TLS
            await self._loop.connect_accepted_socket(
                lambda: self._make_protocol(handshake),
                handshake.raw,
                ssl=self._context,
                ssl_handshake_timeout=_BACKSTOP * self._door.limits.head_timeout_s,
            )
