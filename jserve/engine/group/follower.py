"""A follower's end of `Group/Follow`: runs the leader's steps and never looks at a token.

Part of an engine of several processes.
"""

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Self

import grpc

from jserve.core.errors import ConfigError, EngineError
from jserve.engine.executor import DeviceExecutor, StartedStep
from jserve.proto import group_pb2, group_pb2_grpc
from jserve.proto.limits import KEEPALIVE_OPTIONS, MAX_STEP_BYTES
from jserve.proto.steps import StepReader

_MAX_IN_FLIGHT = 4  # steps started; more would only hide an error
_FAREWELL_S = 2.0


class Leader:
    """The connection to the leading process, as a context. Used by one thread."""

    def __init__(
        self,
        address: str,
        process: int,
        facts: Mapping[str, str],
        *,
        join_timeout_s: float,
        on_loss: Callable[[str], None],
    ) -> None:
        """Joins as `process` (from 1) and waits until all have joined.

        `on_loss` is called, from another thread, when the connection breaks. Raises EngineError
        if there is no leader within the timeout, ConfigError if it refuses.
        """
        self._on_loss = on_loss
        self._closed = threading.Event()
        self._unsent: queue.SimpleQueue[group_pb2.FollowerMessage | None] = queue.SimpleQueue()
        self._channel = grpc.insecure_channel(
            address,
            options=(
                ("grpc.max_receive_message_length", MAX_STEP_BYTES),
                ("grpc.max_reconnect_backoff_ms", 1000),
                *KEEPALIVE_OPTIONS,
            ),
        )
        try:
            grpc.channel_ready_future(self._channel).result(join_timeout_s)
        except grpc.FutureTimeoutError:
            raise EngineError(
                f"there is no leader at {address} after {join_timeout_s:.0f} s; "
                "see --leader_address"
            ) from None
        join = group_pb2.Join(process=process, facts=group_pb2.ProcessFacts(values=facts))
        self._unsent.put(group_pb2.FollowerMessage(join=join))
        self._call = group_pb2_grpc.GroupStub(self._channel).Follow(iter(self._unsent.get, None))
        self._call.add_callback(self._on_end)
        first = self._next()
        if first.WhichOneof("kind") == "refused":
            self._close()
            raise ConfigError(first.refused)
        self.coordinator_address = first.start.coordinator_address

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def ready(self, facts: Mapping[str, str]) -> None:
        """Tells that steps may come, and what must be as on the leader."""
        message = group_pb2.ProcessFacts(values=facts)
        self._unsent.put(group_pb2.FollowerMessage(ready=message))

    def failed(self, reason: str) -> None:
        """Tells why this process ends, and waits for the leader to end, too."""
        self._closed.set()
        self._unsent.put(group_pb2.FollowerMessage(failed=reason))
        ended = threading.Event()
        if self._call.add_callback(ended.set):
            ended.wait(_FAREWELL_S)

    def steps(self) -> Iterator[group_pb2.Step]:
        """Every step in order, until the leader stops. Raises EngineError when it is lost."""
        while (message := self._next()).WhichOneof("kind") == "step":
            yield message.step

    def _next(self) -> group_pb2.LeaderMessage:
        try:
            return next(self._call)
        except StopIteration:
            raise EngineError("the connection to the leader broke") from None
        except grpc.RpcError:
            reason = self._call.details()
            raise EngineError(f"the connection to the leader broke: {reason}") from None

    def _on_end(self) -> None:
        if not self._closed.is_set() and self._call.code() is not grpc.StatusCode.OK:
            self._on_loss(f"the leader is gone: {self._call.details()}")

    def _close(self) -> None:
        self._closed.set()
        self._unsent.put(None)
        self._channel.close()


def follow(executor: DeviceExecutor, reader: StepReader, leader: Leader) -> None:
    """Runs steps until the leader stops. Raises EngineError for one that is not the leader's."""
    in_flight: deque[StartedStep] = deque()
    for step in leader.steps():
        batch = executor.pack(reader.read(step))
        if batch.checksum != step.checksum:
            raise EngineError(f"step {step.number} is not what the leader runs: checksums differ")
        in_flight.append(executor.run(batch))
        if len(in_flight) > _MAX_IN_FLIGHT:
            executor.wait(in_flight.popleft())
    for started in in_flight:
        executor.wait(started)
