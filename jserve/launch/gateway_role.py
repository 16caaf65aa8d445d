"""The gateway, put together: one request plane over one engine, behind HTTP and gRPC."""

import asyncio
import gc
import importlib.metadata
import logging
from collections.abc import Callable
from typing import Self

from jserve.checkpoints.locate import text_assets_from_config
from jserve.checkpoints.progress import FileProgress
from jserve.config import ServeConfig
from jserve.core.clock import WallClock
from jserve.gateway.config import GatewayConfig
from jserve.gateway.connection_limits import ConnectionLimits
from jserve.gateway.engine_watch import EngineWatch
from jserve.gateway.grpc_engine_client import GrpcEngineClient
from jserve.gateway.grpc_server import GrpcServer
from jserve.gateway.http.app import make_app
from jserve.gateway.http.request_bodies import RequestBodies
from jserve.gateway.http.server import HttpServer
from jserve.gateway.loop_lag import LoopLag
from jserve.gateway.metrics import GatewayMetrics
from jserve.gateway.request_plane import RequestPlane
from jserve.gateway.text_model import TextModel
from jserve.gateway.tls import TlsFiles
from jserve.launch.console import Console

_log = logging.getLogger(__name__)
_STOP_GRACE_S = 1.0  # after a drain nothing runs; this is for answers still being written


def load_text(config: ServeConfig, console: Console) -> TextModel:
    """Reads the text side of the configured model, fetched first if it is not there."""
    progress = FileProgress("fetching", console.say)
    assets = text_assets_from_config(config.model, progress)
    return TextModel.from_assets(assets, config.gateway)


class Gateway:
    """Both front ends and the connection to the engine. Owned by one event loop."""

    def __init__(
        self,
        config: GatewayConfig,
        text: TextModel,
        *,
        engine_token: str | None = None,
        watch: EngineWatch | None = None,
        on_hang: Callable[[], None] | None = None,
    ) -> None:
        """Binds the HTTP port; ConfigError if it is taken. `on_hang` ends an engine that hangs."""
        clock = WallClock()
        self._config = config
        self._engine = GrpcEngineClient(
            None,
            reconnect_s=config.reconnect_s,
            resume_wait_s=config.resume_wait_s,
            token=engine_token,
            watch=watch,
            on_hang=on_hang,
        )
        self.plane = RequestPlane(
            tokenizer=text.tokenizer,
            chat_template=text.chat_template,
            defaults=text.defaults,
            engine=self._engine,
            config=config,
            clock=clock,
        )
        self.metrics = metrics = GatewayMetrics(
            clock=clock, seconds_since_step=lambda: self._engine.seconds_since_step
        )
        self._lag = LoopLag(metrics)
        version = importlib.metadata.version("jserve")
        self._bodies = RequestBodies(self.plane)
        app = make_app(self.plane, metrics, version=version, bodies=self._bodies)
        limits = ConnectionLimits.from_config(config)
        if limits.lowered:
            message = "the limit of open files leaves %d connections each to HTTP and gRPC"
            _log.info(message, limits.max_connections)
        self._http = HttpServer(
            app,
            host=config.host,
            port=config.http_port,
            drain_s=_STOP_GRACE_S,
            tls=TlsFiles.from_config(config),
            limits=limits,
            counts=metrics.connections,
        )
        self._grpc = GrpcServer(self.plane, metrics)

    async def __aenter__(self) -> Self:
        """Listens on both ports; not ready before the engine is."""
        await self._grpc.start()
        await self._http.start()
        self._engine.start()
        self._lag.start()
        self.plane.prompts.warm()
        return self

    def connect_to(self, engine_address: str | None) -> None:
        """Tells where the engine is, again whenever it has been started anew; None: it is gone."""
        self._engine.connect_to(engine_address)

    async def until_ready(self) -> None:
        """Returns once the engine has introduced itself."""
        await self._engine.wait_ready()
        # Objects made at start-up stay for good. With them a full collection takes 12 ms of CPU,
        # and more by the clock on a busy machine, in which nobody is served.
        gc.collect()
        gc.freeze()

    async def drain(self) -> None:
        """Refuses new requests (503, UNAVAILABLE) and waits, bounded, for those that run."""
        if not await self.plane.drain(self._config.drain_s):
            _log.warning("requests were cut off after %.0f s", self._config.drain_s)

    async def __aexit__(self, *error: object) -> None:
        """Closes both ports and the connection to the engine; who still waits gets 503."""
        self.plane.cut_off()
        await asyncio.gather(self._http.stop(), self._grpc.stop(_STOP_GRACE_S))
        await self._engine.close()
        await self._lag.stop()
        self.plane.prompts.close()
        self.plane.grammars.close()
        self._bodies.close()
