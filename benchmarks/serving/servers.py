"""Servers that a benchmark starts, waits for and stops."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

from benchmarks.serving.failures import BenchmarkError, NotReady
from benchmarks.serving.target import Target

_POLL_S = 0.2


class ServerProcess:
    """A process group that runs while the context is open. What it prints goes to `log`."""

    def __init__(
        self, name: str, command: Sequence[str], log: Path, *, stop_timeout_s: float = 30
    ) -> None:
        self.name = name
        self._command = command
        self._log = log
        self._stop_timeout_s = stop_timeout_s
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Process id of the server."""
        assert self._process is not None
        return self._process.pid

    def __enter__(self) -> Self:
        """Raises BenchmarkError when the command cannot be started."""
        try:
            with self._log.open("wb") as output:
                self._process = subprocess.Popen(
                    self._command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        except OSError as error:
            raise BenchmarkError(
                f"{self.name}: cannot start {self._command[0]!r} ({error.strerror}); "
                "mend the command or install the server"
            ) from None
        return self

    def __exit__(self, *error: object) -> None:
        """SIGTERM to the group, and SIGKILL to what is left of it."""
        assert self._process is not None
        self._signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(self._stop_timeout_s)
        self._signal(signal.SIGKILL)
        self._process.wait()

    def check_alive(self) -> None:
        """Raises BenchmarkError with the end of the log when the process has ended."""
        assert self._process is not None
        code = self._process.poll()
        if code is not None:
            lines = self._log.read_text("utf-8", "replace").strip().splitlines() or ["(nothing)"]
            raise BenchmarkError(
                f"{self.name} ended with code {code}; its last words, from {self._log}: {lines[-1]}"
            )

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)


async def until_ready(
    make_target: Callable[[], Target], server: ServerProcess | None, timeout_s: float
) -> None:
    """Returns once the server answers a request; raises BenchmarkError when it never will."""
    end_s = time.monotonic() + timeout_s
    while True:
        target = make_target()
        try:
            await target.check()
            return
        except NotReady as error:
            if server is None:
                raise
            server.check_alive()
            if time.monotonic() > end_s:
                raise BenchmarkError(
                    f"{server.name} was not ready after {timeout_s:g} s: {error}"
                ) from None
        finally:
            await target.close()
        await asyncio.sleep(_POLL_S)


def free_port() -> int:
    """A port of loopback that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
