"""The engine's heartbeat: one thread that takes commands in, turns the pipeline, posts updates."""

from collections.abc import Callable
from dataclasses import replace
from heapq import heapify, heappop, heappush

from jserve.core.clock import Clock
from jserve.core.errors import JserveError, Unavailable
from jserve.core.stats import EngineStats
from jserve.core.step import Executor
from jserve.engine.inbox import Abort, Inbox, Outbox, Submit
from jserve.engine.pipeline import Pipeline
from jserve.engine.step_log import StepLog
from jserve.scheduler.scheduler import Scheduler

_IDLE_WAIT_S = 0.5  # an idle engine wakes up to look whether it was asked to stop
_SPARE_DEADLINES = 1024  # of ended sequences, that are kept


class EngineLoop:
    """Owns scheduler and executor; everything else talks to it through inbox and outbox."""

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        inbox: Inbox,
        outbox: Outbox,
        clock: Clock,
        num_compiles: Callable[[], int],
        step_log: StepLog | None = None,
    ) -> None:
        """`num_compiles` counts the compilations since the engine was ready; it should stay 0."""
        self._scheduler = scheduler
        self._pipeline = Pipeline(scheduler, executor, log=step_log)
        self._inbox = inbox
        self._outbox = outbox
        self._clock = clock
        self._num_compiles = num_compiles
        self._deadlines: list[tuple[float, str]] = []  # a heap: when, and of which sequence
        self._draining = False
        self._stopping = False

    def drain(self) -> None:
        """Accepts nothing new and lets `run` return when all is finished. Any thread may call."""
        self._draining = True
        self._inbox.wake()

    def stop(self) -> None:
        """Lets `run` return after the step it is in. Any thread may call it."""
        self._stopping = True
        self._inbox.wake()

    def run(self) -> None:
        """Serves until stopped. A failure is reported to every sequence, then raised."""
        try:
            while not self._stopping:
                if self._draining:
                    self._drain_inbox()  # requests sent before the drain are still accepted
                    self._scheduler.drain()
                    if not self._pipeline.has_work:
                        return
                self.run_once()
            self._fail_all("the engine was stopped before the answer was complete")
        except BaseException as error:
            self._fail_all(f"the engine failed: {error}")
            raise

    def run_once(self) -> None:
        """Takes what came in, starts the next step, and finishes the one before it."""
        self._drain_inbox()
        self._drop_late()
        updates = self._pipeline.turn(self._clock.now_s)
        if updates is not None:
            self._outbox.post(updates, self._stats())
        elif not self._pipeline.num_in_flight:
            self._inbox.wait(_IDLE_WAIT_S)

    def _drain_inbox(self) -> None:
        for command in self._inbox.drain():
            match command:
                case Submit(request, constraint):
                    now_s = self._clock.now_s()
                    try:
                        self._scheduler.add(request, now_s, constraint)
                    except JserveError as error:
                        self._outbox.reject(request.id, error)
                        continue
                    if request.deadline_s is not None:
                        self._keep_deadline(now_s + request.deadline_s, request.id)
                case Abort(request_id):
                    self._scheduler.abort(request_id)

    def _keep_deadline(self, end_s: float, request_id: str) -> None:
        live = self._scheduler.is_live
        if len(self._deadlines) > 2 * self._scheduler.num_live + _SPARE_DEADLINES:
            # Sequences that ended in time leave theirs, which may be days away.
            self._deadlines = [item for item in self._deadlines if live(item[1])]
            heapify(self._deadlines)
        heappush(self._deadlines, (end_s, request_id))

    def _drop_late(self) -> None:
        """Drops the sequences whose deadline has passed; nobody waits for them any more."""
        while self._deadlines and self._deadlines[0][0] <= self._clock.now_s():
            _, request_id = heappop(self._deadlines)
            if self._scheduler.abort(request_id):
                error = Unavailable("the request's deadline has passed", retry_after_s=1.0)
                self._outbox.reject(request_id, error)

    def _fail_all(self, message: str) -> None:
        self._outbox.post(self._pipeline.fail(message), self._stats())

    def _stats(self) -> EngineStats:
        stats = self._scheduler.stats()
        return replace(stats, num_compiles_after_warmup=self._num_compiles())
