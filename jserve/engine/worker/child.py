"""The engine process that the launcher starts: `python -m jserve.engine.worker.child`.

Reads its job from standard input, reports its status on standard output (see
`jserve.proto.engine_status`) and ends when its parent does.
"""

import ctypes
import faulthandler
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable

from jserve.core import logs
from jserve.core.errors import ConfigError
from jserve.engine.build import platform
from jserve.engine.job import read_job
from jserve.proto.engine_status import EngineStatus, Failed, encode

_log = logging.getLogger(__name__)
_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Runs one engine until SIGTERM, a crash, or the death of the parent."""
    report = _take_standard_output()
    # The launcher asks for the stacks of all threads before it ends an engine that hangs.
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides about Ctrl-C
    job = read_job(sys.stdin.buffer)
    _die_with_parent()
    logs.configure(job.log)
    platform.raise_file_limit()
    try:
        platform.pin(job.platform)
        from jserve.engine.worker import roles  # JAX starts here

        if job.only_prepare:
            roles.prepare_model(job, report)
        elif job.process:
            roles.run_follower(job, report)
        else:
            roles.run_engine(job, report)
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
