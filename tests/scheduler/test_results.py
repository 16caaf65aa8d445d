"""Tests of the results that a device may give, and of those that it may not."""

from dataclasses import replace

import numpy as np
import pytest

from jserve.cache.kv_cache import KVCache
from jserve.cache.layout import single_group
from jserve.core.errors import (
    EngineError,
)
from jserve.core.request import Request, SamplingParams, SequenceUpdate
from jserve.core.step import FinishCode, StepPlan, StepResult
from jserve.scheduler.config import SchedulerConfig
from tests.scheduler.rig import (
    Rig,
)

# Log-probabilities.


def test_prompt_logprobs_come_whole_with_the_first_token() -> None:
    rig = Rig(SchedulerConfig(step_tokens=4))
    rig.add("a", prompt=10, max_tokens=3, prompt_logprobs=2)
    rig.add("other", prompt=3, max_tokens=9)
    updates: list[SequenceUpdate] = []
    while rig.scheduler.has_work:
        updates += [update for update in rig.step()[1] if update.request_id == "a"]
    entries = updates[0].prompt_logprobs
    assert entries is not None
    assert entries[0] is None
    assert [entry.token_id for entry in entries[1:] if entry] == [
        (i * i + 1) % 97 for i in range(1, 10)
    ]
    assert {len(entry.top) for entry in entries[1:] if entry} == {2}
    assert all(update.prompt_logprobs is None for update in updates[1:])


def test_logprobs_of_a_step_that_has_none_are_an_error() -> None:
    rig = Rig()
    rig.add("a", logprobs=1)
    plan = rig.scheduler.plan(0.0)
    assert plan is not None
    result = rig.executor.collect(rig.executor.submit(plan))
    with pytest.raises(EngineError, match="without log-prob"):
        rig.scheduler.commit(plan, replace(result, logprobs=None), 0.0)


def test_missing_prompt_logprobs_are_an_error() -> None:
    rig = Rig()
    rig.add("a", prompt_logprobs=0)
    plan = rig.scheduler.plan(0.0)
    assert plan is not None
    result = rig.executor.collect(rig.executor.submit(plan))
    with pytest.raises(EngineError, match="prompt log-prob"):
        rig.scheduler.commit(plan, replace(result, prompt_logprobs=None), 0.0)


# Results that a device may give, and others that it may not.


def answer(plan: StepPlan, num_new: int, code: FinishCode = FinishCode.RUNNING) -> StepResult:
    """Every row of `plan` yields `num_new` times token 7."""
    rows = plan.program.rows
    return StepResult(
        plan.step_id,
        np.full((rows, plan.program.steps), 7, np.int32),
        np.full(rows, num_new, np.int32),
        np.full(rows, code, np.int32),
    )


def test_a_row_may_yield_less_than_planned() -> None:
    scheduler = Rig().scheduler
    request = Request(id="a", prompt=(1, 2, 3), sampling=SamplingParams(max_tokens=20))
    scheduler.add(request, 0.0)
    starts: list[int] = []
    counts = [1, 5, 0, 2]
    for count in counts:
        plan = scheduler.plan(0.0)
        assert plan is not None
        starts.append(plan.chunks[0].start)
        updates = scheduler.commit(plan, answer(plan, count), 0.0)
        assert [update.tokens for update in updates] == ([(7,) * count] if count else [])
    assert starts == [0, 3, 8, 8]
    plan = scheduler.plan(0.0)
    assert plan is not None
    assert plan.chunks[0].start == 3 + sum(counts) - 1


def test_a_sequence_that_owes_tokens_after_its_last_step_is_computed_again() -> None:
    scheduler = Rig().scheduler
    request = Request(id="a", prompt=(1, 2, 3), sampling=SamplingParams(max_tokens=9))
    scheduler.add(request, 0.0)
    plan = scheduler.plan(0.0)
    assert plan is not None
    scheduler.commit(plan, answer(plan, 1), 0.0)
    plan = scheduler.plan(0.0)
    assert plan is not None
    assert plan.num_steps == 8
    scheduler.commit(plan, answer(plan, 6), 0.0)
    plan = scheduler.plan(0.0)
    assert plan is not None
    [admission] = plan.admissions
    assert admission.output == (7,) * 7
    assert plan.chunks[0].tokens == (1, 2, 3, *admission.output)


def test_running_past_the_limit_is_an_error() -> None:
    scheduler = Rig().scheduler
    request = Request(id="a", prompt=(1, 2, 3), sampling=SamplingParams(max_tokens=1))
    scheduler.add(request, 0.0)
    plan = scheduler.plan(0.0)
    assert plan is not None
    with pytest.raises(EngineError, match="limit of 4"):
        scheduler.commit(plan, answer(plan, 1), 0.0)


@pytest.mark.parametrize(
    ("num_new", "code", "message"),
    [
        (9, FinishCode.LENGTH, "gave 9 tokens, at most 8"),
        (9, FinishCode.STOP, "gave 9 tokens, at most 8"),
        (9, FinishCode.RUNNING, "past the limit"),
        (-1, FinishCode.RUNNING, "a row of -1 tokens"),
        (-1, FinishCode.STOP, "a row of -1 tokens"),
        (1, -1, "finish code -1"),
        (1, 3, "finish code 3"),
    ],
)
def test_what_no_row_may_yield_is_an_error(num_new: int, code: int, message: str) -> None:
    rig = Rig()
    rig.add("a", max_tokens=20)
    rig.step()
    plan = rig.scheduler.plan(0.0)
    assert plan is not None
    assert plan.chunks[0].max_new == 8
    result = answer(plan, num_new)
    result.finish[0] = code
    result = replace(result, tokens=np.full((plan.program.rows, 15), 7, np.int32))
    with pytest.raises(EngineError, match=message):
        rig.scheduler.commit(plan, result, 0.0)
    assert rig.scheduler.stats().num_finished == 0


def test_the_cache_learns_which_host_pages_landed() -> None:
    cache = KVCache(single_group(4), 100)
    told: list[tuple[int, ...]] = []
    cache.landed = lambda host_pages: told.append(host_pages)
    scheduler = Rig(cache=cache).scheduler
    request = Request(id="a", prompt=(1, 2, 3), sampling=SamplingParams(max_tokens=20))
    scheduler.add(request, 0.0)
    for host_pages in ((), (3, 1), ()):
        plan = scheduler.plan(0.0)
        assert plan is not None
        scheduler.commit(plan, replace(answer(plan, 1), landed=host_pages), 0.0)
    assert told == [(3, 1)]


def test_host_pages_that_nobody_sent_are_an_error() -> None:
    scheduler = Rig().scheduler
    request = Request(id="a", prompt=(1, 2, 3), sampling=SamplingParams(max_tokens=20))
    scheduler.add(request, 0.0)
    plan = scheduler.plan(0.0)
    assert plan is not None
    with pytest.raises(EngineError, match=r"host pages \(3,\) have landed"):
        scheduler.commit(plan, replace(answer(plan, 1), landed=(3,)), 0.0)


def test_steps_are_committed_in_order_and_once() -> None:
    rig = Rig()
    rig.add("a", max_tokens=30)
    first, second = rig.plan(), rig.plan()
    with pytest.raises(ValueError, match="not the oldest"):
        rig.scheduler.commit(second, answer(second, 1), 0.0)
    with pytest.raises(ValueError, match="result of step 1"):
        rig.scheduler.commit(first, answer(second, 1), 0.0)
    rig.commit()
    with pytest.raises(ValueError, match="not the oldest"):
        rig.scheduler.commit(first, answer(first, 1), 0.0)
