"""Starts one engine as a child process, watches it, and starts it again when it dies."""

import asyncio
import contextlib
import enum
import logging
import signal
from collections.abc import Callable, Sequence

from jserve.control.config import ControlConfig
from jserve.core.clock import Clock
from jserve.core.errors import ConfigError
from jserve.proto.engine_status import EngineStatus, Failed, Ready, decode, describe_exit

_log = logging.getLogger(__name__)
_STACK_DUMP_S = 0.5


class Death(enum.Enum):
    """Why an engine process had to be started again; values are those of the metric's label."""

    CRASH = "crash"
    HANG = "hang"


def restart_delay_s(crashes_in_a_row: int, config: ControlConfig) -> float:
    """Seconds to wait before the next start; the first crash waits `restart_delay_s`."""
    doubled = config.restart_delay_s * 2.0 ** min(crashes_in_a_row - 1, 32)
    return min(doubled, config.max_restart_delay_s)


class EngineProcess:
    """Supervises one engine process. Owned by the event loop that awaits `run`.

    The child gets `payload` on its standard input, which then stays open: end of file tells it
    that its parent is gone. It reports on its standard output (see `engine_status`) and logs on
    standard error. It runs in a session of its own, so a Ctrl-C in the terminal reaches only the
    parent, which decides.
    """

    def __init__(
        self,
        command: Sequence[str],
        payload: bytes,
        config: ControlConfig,
        clock: Clock,
        on_status: Callable[[EngineStatus], None],
        on_death: Callable[[Death], None] = lambda death: None,
    ) -> None:
        """`on_death` is called whenever an engine has ended without being asked to."""
        self._command = list(command)
        self._payload = payload
        self._config = config
        self._clock = clock
        self._on_status = on_status
        self._on_death = on_death
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = asyncio.Event()
        self._failure: Failed | None = None
        self._ready_at_s: float | None = None
        self._hangs = False  # the present engine is being ended for it

    @property
    def pid(self) -> int | None:
        """The process id of the running engine."""
        return self._process.pid if self._process is not None else None

    async def run(self) -> None:
        """Keeps an engine running until `stop`.

        Raises ConfigError when an engine reports one, or when the first dies before it was ready:
        another start would end the same way.
        """
        crashes, was_ready = 0, False
        while not self._stopping.is_set():
            self._failure, self._ready_at_s, self._hangs = None, None, False
            code = await self._run_once()
            if self._stopping.is_set():
                return
            death = Death.HANG if self._hangs else Death.CRASH
            self._on_death(death)
            lived_s = 0.0
            if self._ready_at_s is not None:
                was_ready, lived_s = True, self._clock.now_s() - self._ready_at_s
            self._raise_if_hopeless(code, was_ready)
            crashes = 1 if lived_s >= self._config.healthy_after_s else crashes + 1
            delay_s = restart_delay_s(crashes, self._config)
            _log.error(
                "engine died",
                extra={
                    "reason": death.value,
                    "exit": describe_exit(code),
                    "crashes": crashes,
                    "restart_in_s": delay_s,
                },
            )
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), delay_s)

    def _raise_if_hopeless(self, code: int, was_ready: bool) -> None:
        failure = self._failure
        if failure is not None and failure.is_config_error:
            raise ConfigError(failure.message)
        if not was_ready:
            reason = failure.message if failure is not None else describe_exit(code)
            raise ConfigError(f"the engine could not start: {reason}")

    async def _run_once(self) -> int:
        """Starts a child and returns its exit code once it has ended."""
        process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            start_new_session=True,
            limit=1 << 20,
        )
        self._process = process
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            try:
                process.stdin.write(self._payload)
                await process.stdin.drain()
            except (BrokenPipeError, ConnectionResetError, RuntimeError):
                # The last is uvloop's word for a pipe that broke before the first write. A child
                # without its job is of no use; its end counts as a crash like any other.
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
            async for line in process.stdout:
                self._receive(line)
            return await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
            process.stdin.close()
            self._process = None

    def _receive(self, line: bytes) -> None:
        try:
            status = decode(line)
        except ValueError:
            _log.warning(
                "unexpected output of the engine", extra={"line": line.decode("utf-8", "replace")}
            )
            return
        if isinstance(status, Ready):
            self._ready_at_s = self._clock.now_s()
        elif isinstance(status, Failed):
            self._failure = status
        self._on_status(status)

    async def stop(self, timeout_s: float | None = None) -> None:
        """Ends the engine, politely first, and starts no other. `run` then returns.

        The engine gets `timeout_s` (by default the config's `stop_timeout_s`) after SIGTERM, then
        SIGKILL.
        """
        self._stopping.set()
        process = self._process
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(
                process.wait(), self._config.stop_timeout_s if timeout_s is None else timeout_s
            )
        except TimeoutError:
            _log.warning("engine does not stop; killing it", extra={"pid": process.pid})
            self.kill()

    def end_hung(self) -> None:
        """Ends the present engine, which hangs; `run` starts the next one.

        It first gets the time to write the stacks of its threads to standard error.
        """
        process = self._process
        if process is None or self._hangs or self._stopping.is_set():
            return
        self._hangs = True
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGUSR1)  # the stacks; see `engine.worker.child`
            process.send_signal(signal.SIGCONT)  # a stopped process writes nothing
        asyncio.get_running_loop().call_later(_STACK_DUMP_S, _kill, process)

    def kill(self) -> None:
        """Ends the engine at once and starts no other."""
        self._stopping.set()
        if self._process is not None:
            _kill(self._process)


def _kill(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()
