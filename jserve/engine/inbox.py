"""Commands to the engine's loop thread, and events from it.

The loop knows nothing of wires; whoever carries the messages attaches to these two.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from jserve.core.errors import JserveError
from jserve.core.request import Request, SequenceUpdate
from jserve.core.stats import EngineStats
from jserve.scheduler.constraint import Constraint


@dataclass(frozen=True, slots=True)
class Submit:
    """Take this request; `constraint` binds its output."""

    request: Request
    constraint: Constraint | None = None


@dataclass(frozen=True, slots=True)
class Abort:
    """Drop this sequence; unknown ids are ignored."""

    request_id: str


Command = Submit | Abort


class Inbox:
    """Commands in order of arrival, from any thread to the loop's."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._commands: list[Command] = []
        self._filled = threading.Event()

    def put(self, *commands: Command) -> None:
        """Adds commands and wakes the loop."""
        with self._lock:
            self._commands.extend(commands)
            self._filled.set()

    def drain(self) -> list[Command]:
        """Takes everything; at once, possibly nothing."""
        if not self._filled.is_set():  # the common case of a busy loop: no lock
            return []
        with self._lock:
            commands, self._commands = self._commands, []
            self._filled.clear()
        return commands

    def wait(self, timeout_s: float) -> bool:
        """Sleeps until there is a command or somebody calls `wake`; False on timeout."""
        return self._filled.wait(timeout_s)

    def wake(self) -> None:
        """Ends a `wait`, for example to shut down."""
        self._filled.set()


@dataclass(slots=True)
class Events:
    """Everything the loop has posted since the last delivery."""

    updates: list[SequenceUpdate] = field(default_factory=list[SequenceUpdate])
    rejections: list[tuple[str, JserveError]] = field(default_factory=list[tuple[str, JserveError]])
    stats: EngineStats = field(default_factory=EngineStats)


class Outbox:
    """Events from the loop thread to one carrier; what it has not taken yet is kept together.

    `post` and `reject` never block. Without a carrier only the stats are kept.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._events = Events()
        self._wake: Callable[[], None] | None = None

    def post(self, updates: Sequence[SequenceUpdate], stats: EngineStats) -> None:
        """The outcome of one step; once per step, all sequences together."""
        with self._lock:
            self._events.updates.extend(updates)
            self._events.stats = stats
            self._notify()

    def reject(self, request_id: str, error: JserveError) -> None:
        """The request will not run. RequestError, Overloaded and Unavailable keep their type."""
        with self._lock:
            self._events.rejections.append((request_id, error))
            self._notify()

    def attach(self, wake: Callable[[], None]) -> None:
        """`wake` is called, in the posting thread, when there is something to `take`."""
        with self._lock:
            self._wake = wake

    def detach(self) -> None:
        """No carrier any more; `wake` is not called again once this returns."""
        with self._lock:
            self._wake = None
            self._events = Events(stats=self._events.stats)

    def take(self) -> Events:
        """Everything since the last call, in order."""
        with self._lock:
            events, self._events = self._events, Events(stats=self._events.stats)
        return events

    def _notify(self) -> None:
        if self._wake is None:
            self._events = Events(stats=self._events.stats)
        else:
            self._wake()
