"""The leader's end of `Group/Follow`: gathers the other processes of an engine, tells them steps.

Part of the worker process of an engine of several processes.
"""

import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc

from jserve.core.errors import ConfigError, EngineError
from jserve.core.step import Program, StepPlan
from jserve.engine.group.processes import bind_address
from jserve.engine.program.batch import Batch
from jserve.proto import group_pb2, group_pb2_grpc
from jserve.proto.limits import KEEPALIVE_OPTIONS, MAX_STEP_BYTES
from jserve.proto.steps import StepWriter

_log = logging.getLogger(__name__)

# The device itself lets no process get far ahead: each step needs all of them.
_MAX_UNSENT_STEPS = 64
_SEND_TIMEOUT_S = 30.0
_REMINDER_S = 30.0

LossCallback = Callable[[str], None]


@dataclass(eq=False, slots=True)
class _Follower:
    """One joined process. Its stream's thread takes from `unsent`; None ends the stream."""

    process: int
    unsent: queue.Queue[group_pb2.LeaderMessage | None] = field(
        default_factory=lambda: queue.Queue(_MAX_UNSENT_STEPS)
    )
    failure: str | None = None  # in its own words
    ready: Mapping[str, str] | None = None
    ended: bool = False

    def send(self, message: group_pb2.LeaderMessage | None) -> None:
        try:
            self.unsent.put(message, timeout=_SEND_TIMEOUT_S)
        except queue.Full:
            raise EngineError(
                f"process {self.process} is {_MAX_UNSENT_STEPS} steps behind"
            ) from None


class Followers(group_pb2_grpc.GroupServicer):
    """The other processes of an engine. Steps are published by one thread.

    There is no authentication: the network between the processes must be a trusted one, as for
    `jax.distributed` itself.
    """

    def __init__(
        self,
        address: str,
        num_followers: int,
        facts: Mapping[str, str],
        programs: Sequence[Program],
        on_loss: LossCallback,
    ) -> None:
        """Listens where `address`, host:port (port 0: any), leads the followers.

        `facts` must be those of every follower. `on_loss` is called, from a thread of this class,
        when one that has joined ends before `stop`. Raises ConfigError for a taken port.
        """
        self._num_followers = num_followers
        self._facts = facts
        self._on_loss = on_loss
        self._writer = StepWriter(programs)
        self._joined: dict[int, _Follower] = {}
        self._stopping = False
        self._changed = threading.Condition()
        self._server = grpc.server(
            ThreadPoolExecutor(num_followers + 2, thread_name_prefix="followers"),
            options=(
                ("grpc.so_reuseport", 0),
                ("grpc.max_send_message_length", MAX_STEP_BYTES),
                *KEEPALIVE_OPTIONS,
            ),
        )
        group_pb2_grpc.add_GroupServicer_to_server(self, self._server)
        try:
            port = self._server.add_insecure_port(bind_address(address))
        except RuntimeError as error:
            raise ConfigError(f"leader address {address!r}: cannot be opened") from error
        self.host = address.rpartition(":")[0]
        self.address = f"{self.host}:{port}"
        self._server.start()

    def Follow(  # noqa: N802  the name in the .proto
        self, request_iterator: Iterator[group_pb2.FollowerMessage], context: Any
    ) -> Iterator[group_pb2.LeaderMessage]:
        """Serves one process until either ends."""
        first = next(request_iterator, None)
        if first is None:
            return
        follower = _Follower(first.join.process)
        refusal = self._why_not(follower.process, first.join.facts.values)
        if refusal is not None:
            _log.warning("a process cannot join", extra={"reason": refusal})
            yield group_pb2.LeaderMessage(refused=refusal)
            return
        if (earlier := self._add(follower)) is not None:
            self._end(earlier, "another has joined as this process; is there one --process twice?")
            context.abort(
                grpc.StatusCode.ALREADY_EXISTS, f"process {follower.process} had joined already"
            )
        context.add_callback(lambda: self._end(follower))
        threading.Thread(
            target=self._read,
            args=(request_iterator, follower),
            name="follower-reports",
            daemon=True,
        ).start()
        while (message := follower.unsent.get()) is not None:
            yield message

    def _why_not(self, process: int, facts: Mapping[str, str]) -> str | None:
        """The reason to refuse `process` for good, if there is one."""
        if not 1 <= process <= self._num_followers:
            return (
                f"there is no process {process}; the followers of an engine of "
                f"{self._num_followers + 1} processes are 1 to {self._num_followers}"
            )
        return _difference(process, facts, self._facts)

    def _add(self, follower: _Follower) -> _Follower | None:
        """Lets `follower` join; if one has joined as this process before, returns that instead.

        The earlier one must be lost.
        """
        with self._changed:
            if (earlier := self._joined.get(follower.process)) is not None:
                return earlier
            self._joined[follower.process] = follower
            self._changed.notify_all()
        _log.info("process %d joined the engine", follower.process)
        return None

    def _read(self, messages: Iterator[group_pb2.FollowerMessage], follower: _Follower) -> None:
        try:
            for message in messages:
                with self._changed:
                    if message.WhichOneof("kind") == "ready":
                        follower.ready = dict(message.ready.values)
                    else:
                        follower.failure = message.failed
                    self._changed.notify_all()
                if follower.failure is not None:
                    self._end(follower)
        except grpc.RpcError:
            pass  # the stream's end; `_end` is called for it, too

    def _end(self, follower: _Follower, reason: str = "its connection broke") -> None:
        with self._changed:
            if follower.ended:
                return
            follower.ended = True
            with contextlib.suppress(queue.Full):  # then its stream's thread does not wait
                follower.unsent.put_nowait(None)
            self._changed.notify_all()
            lost = not self._stopping
        if lost:
            self._on_loss(
                f"process {follower.process} of the engine ended: {follower.failure or reason}"
            )

    def start(self, coordinator_address: str, timeout_s: float) -> None:
        """Waits until all have joined, then lets them start.

        Raises EngineError after the timeout.
        """
        with self._changed:
            if not self._changed.wait_for(
                lambda: len(self._joined) == self._num_followers, timeout_s
            ):
                missing = set(range(1, self._num_followers + 1)) - self._joined.keys()
                raise EngineError(
                    f"processes {sorted(missing)} of the engine have not joined {self.address} "
                    f"within {timeout_s:.0f} s; start them with --role=follower"
                )
        self._send(
            group_pb2.LeaderMessage(start=group_pb2.Start(coordinator_address=coordinator_address))
        )

    def wait_ready(self, facts: Mapping[str, str]) -> None:
        """Returns once every follower's engine is ready, and is the same. Raises ConfigError."""
        with self._changed:
            while not self._changed.wait_for(lambda: not self._unready, _REMINDER_S):
                _log.warning("waiting for engines", extra={"processes": self._unready})
        for follower in self._followers:
            assert follower.ready is not None
            if difference := _difference(follower.process, follower.ready, facts):
                raise ConfigError(difference)

    def publish(self, plan: StepPlan, batch: Batch) -> None:
        """Tells all of the next step, without waiting for them."""
        step = self._writer.write(plan, batch.checksum)
        self._send(group_pb2.LeaderMessage(step=step))

    def stop(self, timeout_s: float) -> None:
        """Lets all followers run what was published, and end."""
        with self._changed:
            self._stopping = True
        self._send(group_pb2.LeaderMessage(stop=group_pb2.Stop()))
        self._send(None)
        with self._changed:
            self._changed.wait_for(lambda: all(f.ended for f in self._followers), timeout_s)

    def close(self) -> None:
        """Breaks what connections there still are."""
        with self._changed:
            self._stopping = True
        self._server.stop(None)

    @property
    def _followers(self) -> list[_Follower]:
        return list(self._joined.values())

    @property
    def _unready(self) -> list[int]:
        return sorted(f.process for f in self._followers if f.ready is None)

    def _send(self, message: group_pb2.LeaderMessage | None) -> None:
        for follower in self._followers:
            follower.send(message)


def _difference(process: int, found: Mapping[str, str], wanted: Mapping[str, str]) -> str | None:
    """Names the facts that differ."""
    differing = [
        f"{name} is {found.get(name)} there and {wanted.get(name)} here"
        for name in sorted(found.keys() | wanted.keys())
        if found.get(name) != wanted.get(name)
    ]
    if not differing:
        return None
    return f"process {process} differs from the leader: {'; '.join(differing)}"
