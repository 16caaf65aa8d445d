"""The pipeline beside the plain loop, over the simulated device."""

from collections.abc import Iterable

import pytest

from jserve.cache.kv_cache import KVCache
from jserve.cache.layout import single_group
from jserve.core.request import Request, SamplingParams, SequenceUpdate
from jserve.core.step import Program, ProgramKind, StepPlan, StepResult
from jserve.engine.pipeline import Pipeline, run_serial
from jserve.scheduler.config import SchedulerConfig
from jserve.scheduler.scheduler import Scheduler
from jserve.scheduler.simulated_executor import SimulatedExecutor
from jserve.scheduler.simulated_model import SimulatedModel

PROGRAMS = (Program(ProgramKind.MIXED, 8, 4), Program(ProgramKind.DECODE, 4, 4, 3))
MODEL = SimulatedModel(eos_token_ids=(3,))


class Counting(SimulatedExecutor):
    """Knows how many of its steps were never collected at once."""

    num_in_flight = 0
    most_in_flight = 0

    def submit(self, plan: StepPlan) -> StepResult:
        self.num_in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.num_in_flight)
        return super().submit(plan)

    def collect(self, handle: StepResult) -> StepResult:
        self.num_in_flight -= 1
        return super().collect(handle)


def rig() -> tuple[Scheduler, Counting]:
    sizes = {"num_slots": 4, "num_pages": 14, "page_size": 4}
    cache = KVCache(single_group(4), 14)
    scheduler = Scheduler(
        SchedulerConfig(), cache=cache, num_slots=4, max_model_len=48, programs=PROGRAMS
    )
    return scheduler, Counting(PROGRAMS, model=MODEL, **sizes)


def requests() -> list[Request]:
    return [
        Request(
            id=f"r{i}",
            prompt=tuple(range(4, 6 + 3 * i)),
            sampling=SamplingParams(max_tokens=4 + 2 * i, seed=i),
        )
        for i in range(8)
    ]


def merged(steps: Iterable[list[SequenceUpdate] | None]) -> dict[str, SequenceUpdate]:
    found: dict[str, SequenceUpdate] = {}
    for update in (update for updates in steps for update in updates or ()):
        known = found.get(update.request_id)
        found[update.request_id] = known.then(update) if known else update
    return found


def no_time() -> float:
    return 0.0


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_any_depth_tells_what_the_plain_loop_tells(depth: int) -> None:
    scheduler, executor = rig()
    for request in requests():
        scheduler.add(request, 0.0)
    expected = merged(run_serial(scheduler, executor, no_time))
    assert executor.most_in_flight == 1
    assert scheduler.stats().num_preemptions > 0

    scheduler, executor = rig()
    for request in requests():
        scheduler.add(request, 0.0)
    pipeline = Pipeline(scheduler, executor, depth)
    turns: list[list[SequenceUpdate] | None] = []
    while pipeline.has_work:
        turns.append(pipeline.turn(no_time))
    assert merged(turns) == expected
    for request in requests():
        assert expected[request.id].tokens == tuple(MODEL.generate(request, 48)[0])
    assert executor.most_in_flight == depth
    assert executor.num_in_flight == 0


def test_a_turn_commits_once_the_pipeline_is_full() -> None:
    scheduler, executor = rig()
    pipeline = Pipeline(scheduler, executor)
    assert pipeline.turn(no_time) is None  # nothing to run
    assert not pipeline.has_work
    request = Request(id="a", prompt=(4, 5), sampling=SamplingParams(max_tokens=2, ignore_eos=True))
    scheduler.add(request, 0.0)
    assert pipeline.turn(no_time) is None  # the prompt is on its way
    assert pipeline.num_in_flight == 1
    [first] = pipeline.turn(no_time) or []  # beside the decode of the second token
    assert (len(first.tokens), pipeline.num_in_flight) == (1, 1)
    [last] = pipeline.turn(no_time) or []  # there is nothing more to start
    assert last.finish is not None
    assert not pipeline.has_work


def test_a_commit_is_timed_after_its_result_came() -> None:
    scheduler, executor = rig()
    times = iter([1.0, 2.0, 3.0])
    scheduler.add(requests()[0], 0.5)
    pipeline = Pipeline(scheduler, executor, depth=1)
    [update] = pipeline.turn(lambda: next(times)) or []
    assert update.queue_s == 0.5  # planned at 1.0
    assert next(times) == 3.0  # committed at 2.0


def test_a_failure_forgets_what_is_in_flight() -> None:
    scheduler, executor = rig()
    pipeline = Pipeline(scheduler, executor)
    scheduler.add(requests()[0], 0.0)
    pipeline.turn(no_time)
    [update] = pipeline.fail("the device is gone")
    assert update.error == "the device is gone"
    assert not pipeline.has_work
    assert pipeline.turn(no_time) is None


def test_needs_a_step_in_flight() -> None:
    scheduler, executor = rig()
    with pytest.raises(ValueError, match="at least one"):
        Pipeline(scheduler, executor, depth=0)
