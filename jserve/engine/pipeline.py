"""Steps on their way through the device: step n+1 is planned while the device runs step n."""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from jserve.core.request import SequenceUpdate
from jserve.core.step import Executor, StepPlan
from jserve.engine.step_log import StepLog
from jserve.scheduler.scheduler import Scheduler

Now = Callable[[], float]  # the time in seconds; called where a moment matters


def run_serial(
    scheduler: Scheduler, executor: Executor, now: Now
) -> Iterator[list[SequenceUpdate]]:
    """The plain loop, one step at a time: what `Pipeline` does of depth 1."""
    while (plan := scheduler.plan(now())) is not None:
        result = executor.collect(executor.submit(plan))
        yield scheduler.commit(plan, result, now())


class _Submitted(NamedTuple):
    plan: StepPlan
    handle: Any
    planned_s: float
    submitted_s: float  # only for the log; without one it is `planned_s`


class Pipeline:
    """Keeps up to `depth` steps in flight between a scheduler and an executor. Used by one thread.

    With depth 2 the host plans, packs and commits while the device computes; more would only delay
    what the scheduler learns.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        depth: int = 2,
        log: StepLog | None = None,
    ) -> None:
        if depth < 1:
            raise ValueError(f"depth is {depth}; a pipeline has at least one step in flight")
        self._scheduler = scheduler
        self._executor = executor
        self.depth = depth
        self._log = log
        self._in_flight: deque[_Submitted] = deque()

    @property
    def num_in_flight(self) -> int:
        """Steps that are submitted and not committed."""
        return len(self._in_flight)

    @property
    def has_work(self) -> bool:
        """Whether any sequence lives, or a step is in flight."""
        return bool(self._in_flight) or self._scheduler.has_work

    def turn(self, now: Now) -> list[SequenceUpdate] | None:
        """Starts the next step, then commits the oldest if the pipeline is full or nothing started.

        Returns the updates of the committed step, possibly none of them; None if no step was
        committed: the pipeline fills up, or, with none in flight, nothing can run.
        """
        started = self.start(now) is not None
        if not self._in_flight or (started and len(self._in_flight) < self.depth):
            return None
        return self.finish(now)

    def start(self, now: Now) -> StepPlan | None:
        """Plans and submits a step; None if nothing can run before a commit."""
        planned_s = now()
        plan = self._scheduler.plan(planned_s)
        if plan is not None:
            handle = self._executor.submit(plan)
            submitted_s = planned_s if self._log is None else now()
            self._in_flight.append(_Submitted(plan, handle, planned_s, submitted_s))
        return plan

    def finish(self, now: Now) -> list[SequenceUpdate]:
        """Waits for the oldest step in flight and commits it; there must be one."""
        step = self._in_flight.popleft()
        result = self._executor.collect(step.handle)
        committed_s = now()
        updates = self._scheduler.commit(step.plan, result, committed_s)
        if self._log is not None:
            self._log.write(
                step.plan,
                result,
                planned_s=step.planned_s,
                submitted_s=step.submitted_s,
                committed_s=committed_s,
            )
        return updates

    def fail(self, message: str) -> list[SequenceUpdate]:
        """Forgets the steps in flight and ends every sequence with `message`."""
        self._in_flight.clear()
        return self._scheduler.fail_all(message)
