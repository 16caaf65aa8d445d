"""The job that the launcher, or the leader of several processes, gives to an engine process."""

import pickle
import struct
import sys
from dataclasses import dataclass, field
from typing import BinaryIO

from jserve.cache.config import CacheConfig
from jserve.checkpoints.config import ModelConfig
from jserve.core.logs import LogConfig
from jserve.engine.config import EngineConfig, PlatformConfig
from jserve.scheduler.config import SchedulerConfig

_LENGTH = struct.Struct("<Q")
COMMAND = (sys.executable, "-m", "jserve.engine.worker.child")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineJob:
    """Configs of one engine process, and its part.

    It listens for gateways on `address`, with `token` if that is a TCP address; see
    `engine.worker.session_server`. In an engine of several
    processes `process` is its number and `leader_address` is where the followers find process 0;
    see `engine.group`. With `only_prepare` it completes the model's files and ends.
    """

    model: ModelConfig
    engine: EngineConfig
    scheduler: SchedulerConfig
    cache: CacheConfig
    platform: PlatformConfig
    log: LogConfig
    # Config values by dotted name, as text: all processes of one engine must agree on them.
    fields: dict[str, str]
    drain_s: float  # longest time from SIGTERM to the end of the last request
    address: str = ""
    token: str | None = field(default=None, repr=False)
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
