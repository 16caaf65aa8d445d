"""Runs the HTTP application in the caller's event loop, by uvicorn."""

import asyncio
import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from jserve.core.addresses import host_and_port
from jserve.core.errors import ConfigError
from jserve.gateway.http.upgrade import PlainHttpProtocol
from jserve.gateway.tls import TlsFiles

_IDLE_S = 75.0  # a kept-alive connection without a request; load balancers close theirs at 60
_MAX_HEAD_BYTES = 64 << 10  # request line and headers
_BACKLOG = 4096  # connections that the kernel holds until they are accepted


class _Protocol(PlainHttpProtocol):
    """Uvicorn's protocol; bounds the head of a request and tells all requests of a lost client."""

    _head_bytes: int | None = None  # bytes of the incoming head; None between heads
    _running: RequestResponseCycle | None = None

    def on_message_begin(self) -> None:
        self._head_bytes = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._head_bytes = None
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._head_bytes is not None:
            self._head_bytes += len(data)
            if self._head_bytes > _MAX_HEAD_BYTES and not self.transport.is_closing():
                self.send_400_response("The head of the request is too large.")

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def connection_lost(self, exc: Exception | None) -> None:
        # Uvicorn tells only the newest request, which may wait behind the running one.
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()
        super().connection_lost(exc)


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:  # the launcher owns the process's signals
        yield


class HttpServer:
    """Listens from construction on, serves from `start` to `stop`. Owned by the launcher."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        host: str,
        port: int,
        drain_s: float,
        tls: TlsFiles | None = None,
    ) -> None:
        """Binds the port; 0 takes a free one. With `tls` it speaks HTTPS.

        Raises:
            ConfigError: the address cannot be bound.
        """
        self._socket = _bind(host, port)
        config = uvicorn.Config(
            app,
            http=_Protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=False,
            proxy_headers=False,
            backlog=_BACKLOG,
            ssl_context_factory=None if tls is None else lambda *_: tls.server_context(),
            timeout_keep_alive=int(_IDLE_S),
            timeout_graceful_shutdown=max(1, round(drain_s)),
        )
        self._server = _Server(config)
        self._serving: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        return self._socket.getsockname()[1]

    async def start(self) -> None:
        """Begins to accept; returns once it does."""
        self._serving = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        while not self._server.started and not self._serving.done():
            await asyncio.sleep(0.001)

    async def stop(self) -> None:
        """Refuses new requests, waits at most `drain_s` for the running ones, then cancels them."""
        self._server.should_exit = True
        if self._serving is not None:
            await self._serving

    def kill(self) -> None:
        """Ends the waiting of a `stop` in progress."""
        self._server.should_exit = True
        self._server.force_exit = True


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's algorithm off only where the protocol is named; with it on, every
    # answer on a kept-alive connection waits 40 ms for the client's delayed acknowledgement.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        address = host_and_port(host, port)
        message = f"cannot listen for HTTP on {address}: {error}; choose another http_port"
        raise ConfigError(message) from error
    listener.setblocking(False)
    return listener
