"""What the launcher, or the leader of several processes, tells an engine process to do."""

import pickle
import struct
import sys
from dataclasses import dataclass
from typing import BinaryIO

from jserve.config import ServeConfig

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
