"""Runs the serving roles: the gateway in this process, the engine in a child it supervises."""

import asyncio
import dataclasses
import enum
import errno
import logging
import signal
import socket
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import uvloop

from jserve.config import ServeConfig, flatten
from jserve.control.engine_process import Death, EngineProcess
from jserve.core.addresses import host_and_port
from jserve.core.clock import WallClock
from jserve.core.errors import ConfigError
from jserve.engine.job import COMMAND, encode_job
from jserve.gateway.config import GatewayConfig
from jserve.gateway.engine_watch import EngineWatch
from jserve.launch.console import Console, show_summary
from jserve.launch.engine_link import private_socket_folder
from jserve.launch.jobs import engine_job
from jserve.proto.engine_status import (
    EngineStatus,
    ModelPrepared,
    PhaseProgress,
    PhaseStarted,
    Ready,
)

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_EXIT_INTERRUPTED = 130  # the code that shells report for a process ended by Ctrl-C


def serve_all(config: ServeConfig, leader_address: str | None = None) -> int:
    """Serves until SIGTERM or Ctrl-C; returns the exit code.

    `leader_address` is where the other processes of the engine find it, if they run elsewhere.
    """

    async def body(drain: asyncio.Event) -> int:
        # The engine listens on a socket of a new name after every restart, and tells which.
        with private_socket_folder() as address:
            return await _serve_all(config, address, leader_address, drain)

    return _run(body)


def serve_gateway(config: ServeConfig, engine_address: str, token: str | None) -> int:
    """Serves with an engine that runs elsewhere, which holds `token`; returns the exit code."""
    return _run(lambda drain: _serve_gateway(config, engine_address, token, drain))


def serve_follower(config: ServeConfig, process: int, leader_address: str) -> int:
    """Keeps one more process of an engine running that is led elsewhere; returns the exit code."""
    return _run(lambda drain: _serve_follower(config, process, leader_address, drain))


def _run(body: Callable[[asyncio.Event], Coroutine[Any, Any, int]]) -> int:
    """Runs `body` until it ends. The first signal sets its event, the second cancels it."""

    async def main() -> int:
        drain = asyncio.Event()
        task = asyncio.create_task(body(drain))

        def on_signal() -> None:
            if drain.is_set():
                task.cancel()
            drain.set()

        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, on_signal)
        try:
            return await task
        except asyncio.CancelledError:
            return _EXIT_INTERRUPTED

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main())


class _StartUp:
    """Collects the engine's reports of its start, and shows each one as it comes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self.prepared: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self.ready: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        self._address: str | None = None
        self._on_address: Callable[[str | None], None] | None = None
        self._on_death: Callable[[str], None] | None = None

    def follow(
        self, on_address: Callable[[str | None], None], on_death: Callable[[str], None]
    ) -> None:
        """Calls back with the engine's address, now and after restarts; None when it has died.

        Then `on_death` is called with the reason, too.
        """
        self._on_address, self._on_death = on_address, on_death
        if self._address is not None:
            on_address(self._address)

    def on_death(self, death: Death) -> None:
        """Called when an engine process has ended; nobody listens at its address any more."""
        self._address = None
        if self._on_address is not None and self._on_death is not None:
            self._on_death(death.value)
            self._on_address(None)

    def on_status(self, status: EngineStatus) -> None:
        """Called with every status line of every engine process, restarted ones too."""
        if isinstance(status, Ready):
            self._address = status.address
            if self._on_address is not None:
                self._on_address(status.address)
        if self.ready.done():
            if isinstance(status, Ready):
                _log.info("engine is serving again", extra=status.phases)
            return
        match status:
            case PhaseStarted(phase, detail):
                self._console.say(f"{phase} {detail}".rstrip())
            case PhaseProgress(detail):
                self._console.say(f"  {detail}")
            case ModelPrepared() if not self.prepared.done():
                self.prepared.set_result(True)
            case Ready():
                self.ready.set_result(status)
            case _:
                pass


def _watch(config: ServeConfig) -> EngineWatch:
    return EngineWatch(suspect_s=config.control.suspect_s, hang_s=config.control.hang_s)


def _named(config: ServeConfig) -> GatewayConfig:
    """The gateway's config with the name of the model, known before the engine says it."""
    name = config.gateway.served_model_name or config.model.name
    return dataclasses.replace(config.gateway, served_model_name=name)


async def _serve_all(
    config: ServeConfig, address: str, leader_address: str | None, drain: asyncio.Event
) -> int:
    _require_free_port(config.gateway.host, config.gateway.http_port, "--http_port")
    _require_free_port(config.gateway.host, config.gateway.grpc_port, "--grpc_port")
    _log_config(config)
    console = Console()
    start_up = _StartUp(console)
    engine = EngineProcess(
        COMMAND,
        encode_job(engine_job(config, address, leader_address=leader_address)),
        config.control,
        WallClock(),
        start_up.on_status,
        start_up.on_death,
    )
    supervision = asyncio.create_task(engine.run())
    try:
        await asyncio.sleep(0)  # the engine process starts while this one imports
        from jserve.launch.gateway_role import Gateway, load_text

        if await _first(start_up.prepared, supervision, drain):
            text = load_text(config, console)
            async with Gateway(
                _named(config), text, watch=_watch(config), on_hang=engine.end_hung
            ) as gateway:
                start_up.follow(gateway.connect_to, gateway.metrics.count_restart)
                ready = await _first(start_up.ready, supervision, drain)
                if ready is not None:
                    await gateway.until_ready()
                    show_summary(console, gateway.plane, ready)
                    await _first(asyncio.get_running_loop().create_future(), supervision, drain)
                    console.say("draining: nothing new is accepted; Ctrl-C again stops at once")
                    await gateway.drain()
        await engine.stop()
        console.say("stopped")
        return 0
    finally:
        engine.kill()
        await asyncio.wait([supervision], timeout=config.control.stop_timeout_s)


async def _serve_gateway(
    config: ServeConfig, engine_address: str, token: str | None, drain: asyncio.Event
) -> int:
    from jserve.launch.gateway_role import Gateway, load_text

    _log_config(config)
    console = Console()
    text = load_text(config, console)
    async with Gateway(_named(config), text, engine_token=token, watch=_watch(config)) as gateway:
        gateway.connect_to(engine_address)
        console.say(f"waiting for the engine at {engine_address}")
        waiting = asyncio.create_task(gateway.until_ready())
        stop = asyncio.create_task(drain.wait())
        await asyncio.wait({waiting, stop}, return_when=asyncio.FIRST_COMPLETED)
        if waiting.done():
            show_summary(console, gateway.plane, Ready(engine_address))
        await stop
        waiting.cancel()
        console.say("draining: nothing new is accepted; Ctrl-C again stops at once")
        await gateway.drain()
    return 0


async def _serve_follower(
    config: ServeConfig, process: int, leader_address: str, drain: asyncio.Event
) -> int:
    _log_config(config)
    console = Console()
    start_up = _StartUp(console)
    engine = EngineProcess(
        COMMAND,
        encode_job(engine_job(config, process=process, leader_address=leader_address)),
        config.control,
        WallClock(),
        start_up.on_status,
    )
    supervision = asyncio.create_task(engine.run())
    try:
        if (ready := await _first(start_up.ready, supervision, drain)) is not None:
            console.table(f"process {process} follows {leader_address}", ready.summary)
            await _first(asyncio.get_running_loop().create_future(), supervision, drain)
        console.say("waiting for the leader to drain; Ctrl-C again stops at once")
        await engine.stop(config.drain_s + config.control.stop_timeout_s)
        return 0
    finally:
        engine.kill()
        await asyncio.wait([supervision], timeout=config.control.stop_timeout_s)


async def _first(
    result: Awaitable[_T], supervision: asyncio.Task[None], drain: asyncio.Event
) -> _T | None:
    """The result, or None when a drain was asked for first. Raises what supervision raises."""
    wanted = asyncio.ensure_future(result)
    stop = asyncio.create_task(drain.wait())
    try:
        await asyncio.wait({wanted, stop, supervision}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        stop.cancel()
    if supervision.done():
        supervision.result()
    return wanted.result() if wanted.done() else None


def _require_free_port(host: str, port: int, flag: str) -> None:
    """Raises ConfigError before any work is done for a port that cannot be opened."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            wrong_host = isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL
            raise ConfigError(
                f"{host_and_port(host, port)} cannot be opened ({error.strerror}); "
                f"choose another with {'--host' if wrong_host else flag}"
            ) from None


def _log_config(config: ServeConfig) -> None:
    """Logs the resolved config once."""
    leaves = {
        name: value.value if isinstance(value, enum.Enum) else value
        for name, value in flatten(config).items()
    }
    _log.info("config", extra=leaves)
