"""Runs the HTTP application in the caller's event loop, by uvicorn."""

import asyncio
import contextlib
import socket
import time
from collections.abc import Iterator
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from jserve.core.addresses import host_and_port
from jserve.core.errors import ConfigError
from jserve.gateway.config import GatewayConfig
from jserve.gateway.connection_limits import ConnectionLimits
from jserve.gateway.http.connections import Door, TimedProtocol
from jserve.gateway.http.tls_listener import Handshake, TlsListener
from jserve.gateway.metrics import ConnectionCounts
from jserve.gateway.tls import TlsFiles

_IDLE_S = 75.0  # a kept-alive connection without a request; load balancers close theirs at 60
_MAX_HEAD_BYTES = 64 << 10  # request line and headers
_BACKLOG = 4096  # connections that the kernel holds until they are accepted


class _Protocol(TimedProtocol):
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
    def __init__(self, config: uvicorn.Config, door: Door) -> None:
        super().__init__(config)
        self._door = door
        self._sweep_s = 0.0  # when the next one is due

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:  # the launcher owns the process's signals
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listens. Unlike uvicorn's, it bounds connections before their TLS handshake, too."""
        await self.lifespan.startup()
        config = self.config

        def make_protocol(handshake: Handshake | None = None) -> _Protocol:
            state = self.server_state, self.lifespan.state
            return _Protocol(config, *state, door=self._door, handshake=handshake)

        async def listen(listener: socket.socket) -> Any:
            backlog = config.backlog
            if config.ssl is not None:
                return TlsListener(listener, config.ssl, self._door, make_protocol, backlog=backlog)
            loop = asyncio.get_running_loop()
            return await loop.create_server(make_protocol, sock=listener, backlog=backlog)

        self.servers = [await listen(each) for each in sockets or ()]
        self.started = True

    async def on_tick(self, counter: int) -> bool:
        if (now_s := time.monotonic()) >= self._sweep_s and self._door.sweep():
            self._sweep_s = now_s + self._door.sweep_s
        return await super().on_tick(counter)


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
        limits: ConnectionLimits | None = None,
        counts: ConnectionCounts | None = None,
    ) -> None:
        """Binds the port; 0 takes a free one. With `tls` it speaks HTTPS.

        `limits` are the defaults of a config where none are given; `counts` is written to.

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
        limits = limits or ConnectionLimits.from_config(GatewayConfig())
        self._server = _Server(config, Door(limits, counts or ConnectionCounts()))
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
