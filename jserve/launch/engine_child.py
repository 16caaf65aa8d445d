"""The engine process that the launcher starts: `python -m jserve.launch.engine_child`.

Reads its job from standard input, reports its status on standard output (see
`jserve.control.engine_status`) and ends when its parent does.
"""

import ctypes
import logging
import os
import pickle
import signal
import struct
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import BinaryIO

from jserve.config import ServeConfig
from jserve.control.engine_status import EngineStatus, Failed, encode
from jserve.core.errors import ConfigError
from jserve.launch import logs, platform

_log = logging.getLogger(__name__)
_PR_SET_PDEATHSIG = 1
_LENGTH = struct.Struct("<Q")
COMMAND = (sys.executable, "-m", "jserve.launch.engine_child")


@dataclass(frozen=True, slots=True)
class EngineJob:
    """What the parent sends: the config and where to listen, `host:port` (port 0: any).

    Of an engine of several processes, `process` is which one; see `launch.replica`. With
    `only_prepare` the model's files are made complete, and that is all.
    """

    config: ServeConfig
    address: str
    process: int = 0
    leader_address: str | None = None
    only_prepare: bool = False


def encode_job(job: EngineJob) -> bytes:
    """The bytes for the child's standard input."""
    body = pickle.dumps(job)
    return _LENGTH.pack(len(body)) + body


def read_job(stream: BinaryIO) -> EngineJob:
    """Reads what `encode_job` made. Raises EOFError when the parent is gone."""
    head = stream.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        raise EOFError("no job on standard input")
    (length,) = _LENGTH.unpack(head)
    body = stream.read(length)
    if len(body) < length:
        raise EOFError("half a job on standard input")
    return pickle.loads(body)  # noqa: S301 - from the parent process


def main() -> None:
    """Runs one engine until SIGTERM, a crash, or the death of the parent."""
    report = _take_standard_output()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides about Ctrl-C
    job = read_job(sys.stdin.buffer)
    _die_with_parent()
    logs.configure(job.config.log)
    platform.raise_file_limit()
    try:
        platform.pin(job.config.platform)
        from jserve.launch import engine_role  # JAX starts here

        if job.only_prepare:
            engine_role.prepare_model(job.config, report)
        elif job.process:
            assert job.leader_address is not None
            engine_role.run_follower(job.config, job.process, job.leader_address, report)
        else:
            engine_role.run_engine(job.config, job.address, report, job.leader_address)
    except ConfigError as error:
        report(Failed(str(error), is_config_error=True))
        os._exit(2)  # the exit handlers of JAX wait for its other processes
    except Exception as error:
        _log.exception("engine failed")
        report(Failed(f"{type(error).__name__}: {error}", is_config_error=False))
        os._exit(1)


def _take_standard_output() -> Callable[[EngineStatus], None]:
    """Keeps standard output for status lines; whatever else is printed goes to standard error."""
    channel = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    lock = threading.Lock()

    def report(status: EngineStatus) -> None:
        with lock:
            try:
                channel.write(encode(status))
            except BrokenPipeError:
                os._exit(1)  # nobody supervises any more

    return report


def _die_with_parent() -> None:
    """Ends this process when the parent's end of the pipe closes, even by SIGKILL."""
    if sys.platform == "linux":  # faster than the pipe, and works while the GIL is held
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    def wait() -> None:
        # Not through sys.stdin: its lock, held by a daemon thread, would trouble a normal exit.
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=wait, name="parent-watch", daemon=True).start()


if __name__ == "__main__":
    main()
