"""What a load is sent to: an HTTP server or a gRPC service."""

from dataclasses import dataclass
from typing import Any, Protocol

from benchmarks.serving.record import Record
from benchmarks.serving.workload import Job


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """What a server says of itself, and how it is spoken to."""

    model: str
    dialect: str
    prompt: str  # ids or text
    max_model_len: int | None = None


class Target(Protocol):
    """A server under load. Owned by one event loop."""

    async def check(self) -> ServerInfo:
        """Finds the model and sends one small request; must come first.

        Raises BenchmarkError that names what to mend.
        """
        ...

    def prepare(self, job: Job) -> Any:
        """The request of a job, ready to send: what costs time is done here."""
        ...

    async def send(self, request: Any, record: Record) -> None:
        """Sends it and writes what comes into `record`. Raises RequestFailed."""
        ...

    async def close(self) -> None:
        """Drops the connections."""
        ...
