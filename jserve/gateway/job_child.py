"""The child side of `job_process`: runs jobs from standard input, one after another, in bounds.

Started as `python -m jserve.gateway.job_child MODULE MEMORY_BYTES CPU_S`. The module has
`make_handler(start: bytes) -> Handler`. The process ends with its parent: at the end of the input,
or when a job's time is over, for which the kernel ends it.
"""

import contextlib
import importlib
import json
import os
import resource
import signal
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from jserve.core.errors import PromptTooLong, RequestError

Handler = Callable[[bytes], bytes]

# What a reply begins with: its kind, and the length of the rest.
HEAD = struct.Struct("<BQ")
LENGTH = struct.Struct("<Q")  # what a job begins with
DONE, REFUSED, OUT_OF_MEMORY, FAILED = range(4)

# On a busy machine a job must not take the processor from the event loop that serves everybody, or
# from the engine: the client of one large body or slow template waits instead.
_NICENESS = 10


_AUTOGROUP = Path("/proc/self/autogroup")


def step_aside(niceness: int) -> None:
    """Lowers the priority of this process, also where Linux shares processors by session.

    There the niceness of a process counts only within its session, and a process in a session of
    its own would get as much as all of a server's threads. The session's niceness is another one.
    """
    os.nice(niceness)
    with contextlib.suppress(OSError):  # there is no such thing, or it changed a moment ago
        _AUTOGROUP.write_text(str(niceness))


def read_exactly(stream: BinaryIO, size: int) -> bytes | None:
    """Reads `size` bytes; None when the stream ends before."""
    data = stream.read(size)
    return data if len(data) == size else None


def read_job(stream: BinaryIO) -> bytes | None:
    """Reads one job; None when there are no more."""
    head = read_exactly(stream, LENGTH.size)
    return None if head is None else read_exactly(stream, LENGTH.unpack(head)[0])


def refusal(error: RequestError) -> bytes:
    """Encodes an error that the client of the request gets."""
    fields = {
        "too_long": isinstance(error, PromptTooLong),
        "message": str(error),
        "param": error.param,
    }
    return json.dumps(fields).encode()


def run(handler: Handler, job: bytes) -> tuple[int, bytes]:
    """Returns kind and body of the reply to a job."""
    try:
        return DONE, handler(job)
    except RequestError as error:
        return REFUSED, refusal(error)
    except MemoryError:
        return OUT_OF_MEMORY, b""
    except Exception as error:
        return FAILED, f"{type(error).__name__}: {error}".encode(errors="replace")


def main(module: str, memory_bytes: int, cpu_s: float) -> None:
    """Serves until the input ends, or until a job has used up the memory."""
    jobs, replies = sys.stdin.buffer, os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing else is a reply
    step_aside(_NICENESS)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # nobody needs a traceback of a parent that left
    start = read_job(jobs)
    if start is None:
        return
    make_handler = importlib.import_module(module).make_handler
    with contextlib.suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    handler = make_handler(start)
    signal.setitimer(signal.ITIMER_PROF, 0)
    while (job := read_job(jobs)) is not None:
        signal.setitimer(signal.ITIMER_PROF, cpu_s)
        kind, body = run(handler, job)
        signal.setitimer(signal.ITIMER_PROF, 0)
        replies.write(HEAD.pack(kind, len(body)))
        replies.write(body)
        replies.flush()
        if kind == OUT_OF_MEMORY:  # what is left of it is of no use
            return


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]))
