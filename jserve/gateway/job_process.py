"""Child processes for work that holds Python's interpreter, never ends, or takes all memory.

A job is bytes in, bytes out. The event loop of this process goes on meanwhile, which no thread
would let it do.
"""

import asyncio
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from jserve.core.errors import EngineError, PromptTooLong, RequestError
from jserve.gateway.job_child import DONE, FAILED, HEAD, LENGTH, OUT_OF_MEMORY, REFUSED
from jserve.gateway.turns import TenantTurns

_READ_BYTES = 1 << 20


class JobStopped(Exception):
    """A job was ended because it exceeded its time or memory; the message says which."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobLimits:
    """Bounds of one job. Processor time is exact; the other is for a process that is not run."""

    cpu_s: float
    memory_bytes: int  # of the whole process
    wall_s: float = 30.0
    reply_bytes: int = 64 << 20


class JobProcesses:
    """Up to `most` processes with the handler of one module; started at need, replaced when ended.

    They are idle between jobs, and end with this process or with this object. Their standard error
    is that of this process. Tenants take turns at them. Owned by one event loop.
    """

    def __init__(
        self,
        module: str,
        start: bytes,
        limits: JobLimits,
        *,
        most: int = 1,
    ) -> None:
        """`start` is what the module's `make_handler` gets."""
        self._command = (
            *(sys.executable, "-m", "jserve.gateway.job_child", module),
            *(str(limits.memory_bytes), str(limits.cpu_s)),
        )
        self._start = start
        self._limits = limits
        self._turns = TenantTurns(most)
        self._threads = ThreadPoolExecutor(most, thread_name_prefix=module.rpartition(".")[2])
        self._lock = threading.Lock()
        self._idle: list[subprocess.Popen[bytes]] = []
        self._all: set[subprocess.Popen[bytes]] = set()
        self._finalizer = weakref.finalize(self, _end_all, self._all)

    def warm(self) -> None:
        """Starts one process, so that the first job finds it running; does not wait for it."""
        self._threads.submit(self._warm)

    def close(self) -> None:
        """Ends all processes; jobs that run are stopped."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._finalizer()

    async def call(self, job: bytes, tenant: str) -> bytes:
        """Returns the handler's reply, once it was the turn of `tenant`.

        Raises:
            RequestError: the handler refused the job.
            JobStopped: the job exceeded a limit.
            EngineError: the handler failed, or no process can be started.
        """
        await self._turns.take(tenant)
        try:
            if not self._finalizer.alive:
                raise _closed()
            loop = asyncio.get_running_loop()
            running = loop.run_in_executor(self._threads, self._run, job)
        except BaseException:
            self._turns.give_back(tenant)
            raise
        running.add_done_callback(lambda _: self._turns.give_back(tenant))
        # A caller that is cancelled leaves a process that works on, and its place is still taken.
        return await asyncio.shield(running)

    def _warm(self) -> None:
        with self._lock:
            if self._idle:
                return
        process = self._spawn()
        with self._lock:
            self._idle.append(process)

    def _run(self, job: bytes) -> bytes:
        with self._lock:
            process = self._idle.pop() if self._idle else None
        if process is not None and process.poll() is not None:  # ended while it was idle
            self._discard(process)
            process = None
        if process is None:
            process = self._spawn()
        try:
            _send(process, job)
            kind, body = self._reply(process)
        except (OSError, JobStopped) as error:
            self._discard(process)
            if process.returncode == -signal.SIGPROF:
                raise JobStopped(f"it takes longer than {self._limits.cpu_s:g} s") from None
            if isinstance(error, JobStopped):
                raise
            raise JobStopped("its process ended") from error
        if kind == OUT_OF_MEMORY:
            self._discard(process)
            raise JobStopped("it takes too much memory")
        with self._lock:
            self._idle.append(process)
        if kind == REFUSED:
            raise _refused(body)
        if kind == FAILED:
            raise EngineError(body.decode())
        return body

    def _spawn(self) -> subprocess.Popen[bytes]:
        try:
            process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is for this process, which drains
            )
        except OSError as error:
            raise EngineError(f"cannot start a process: {error}") from error
        self._all.add(process)
        if not self._finalizer.alive:  # closed meanwhile
            self._discard(process)
            raise _closed()
        try:
            _send(process, self._start)
        except OSError as error:
            self._discard(process)
            raise EngineError(f"a process ended as it started: {error}") from error
        return process

    def _reply(self, process: subprocess.Popen[bytes]) -> tuple[int, bytes]:
        deadline_s = time.monotonic() + self._limits.wall_s
        kind, length = HEAD.unpack(_receive(process, HEAD.size, deadline_s))
        if kind not in (DONE, REFUSED, OUT_OF_MEMORY, FAILED) or length > self._limits.reply_bytes:
            raise JobStopped("its answer is too large")
        return kind, _receive(process, length, deadline_s)

    def _discard(self, process: subprocess.Popen[bytes]) -> None:
        _end(process)
        self._all.discard(process)


def _send(process: subprocess.Popen[bytes], job: bytes) -> None:
    assert process.stdin is not None
    process.stdin.write(LENGTH.pack(len(job)))
    process.stdin.write(job)
    process.stdin.flush()


def _receive(process: subprocess.Popen[bytes], size: int, deadline_s: float) -> bytes:
    """Reads `size` bytes of the answer. Raises JobStopped at the deadline, and OSError at its end.

    Waits without the GIL, for as long as the child computes.
    """
    assert process.stdout is not None
    descriptor = process.stdout.fileno()
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    data = bytearray()
    while len(data) < size:
        left_s = deadline_s - time.monotonic()
        if left_s <= 0 or not poller.poll(left_s * 1e3):
            raise JobStopped("it takes too long")
        piece = os.read(descriptor, min(size - len(data), _READ_BYTES))
        if not piece:
            raise BrokenPipeError("the process ended")
        data += piece
    return bytes(data)


def _closed() -> EngineError:
    return EngineError("the server is shutting down")


def _refused(body: bytes) -> RequestError:
    fields = json.loads(body)
    kind = PromptTooLong if fields["too_long"] else RequestError
    return kind(fields["message"], param=fields["param"])


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):  # half a job was not sent
                stream.close()


def _end_all(processes: set[subprocess.Popen[bytes]]) -> None:
    for process in tuple(processes):
        _end(process)
    processes.clear()
