"""Targets of a load: an HTTP server or a gRPC service."""

from dataclasses import dataclass
from typing import Any, Protocol

from benchmarks.serving.record import Record
from benchmarks.serving.workload import Job


@dataclass(frozen=True, slots=True)
class ServerInfo:
    """Model and context of a server as it tells them, and the way to ask it."""

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
        """Makes the request of a job, ready to send: all that costs time is done here."""
        ...

    async def send(self, request: Any, record: Record) -> None:
        """Sends a request and writes the answer's arrival into `record`. Raises RequestFailed."""
        ...

    async def close(self) -> None:
        """Drops the connections."""
        ...
