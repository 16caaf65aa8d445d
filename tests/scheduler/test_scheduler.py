"""The scheduler's promises, one by one, on a simulated device that checks every plan."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from jserve.cache.kv_cache import NO_HIT, Hit, KVCache, PageDelta, Pages
from jserve.cache.layout import single_group
from jserve.core import step
from jserve.core.errors import (
    ConfigError,
    EngineError,
    Overloaded,
    PromptTooLong,
    RequestError,
    Unavailable,
)
from jserve.core.request import FinishReason, Request, SamplingParams, SequenceUpdate
from jserve.core.step import FinishCode, Program, ProgramKind, StepPlan, StepResult
from jserve.engine.pipeline import Pipeline
from jserve.scheduler.config import SchedulerConfig
from jserve.scheduler.policy import FIRST_COME_FIRST_SERVED, Policy, last_in_rank
from jserve.scheduler.queue import RankedQueue
from jserve.scheduler.scheduler import Scheduler
from jserve.scheduler.sequence import Event, Sequence, SequenceView
from jserve.scheduler.simulated_executor import SimulatedExecutor
from jserve.scheduler.simulated_model import SimulatedModel
from tests.scheduler.sharing_cache import SharingCache

ENDLESS = SimulatedModel(vocab=97, eos_token_ids=())  # nothing stops but the limit
MIXED_8 = Program(ProgramKind.MIXED, 8, 4)
MIXED_32 = Program(ProgramKind.MIXED, 32, 4)
DECODE_2 = Program(ProgramKind.DECODE, 2, 2, 8)
DECODE_4 = Program(ProgramKind.DECODE, 4, 4, 8)
PROGRAMS = (MIXED_32, DECODE_4, MIXED_8, DECODE_2)


class Recording(SimulatedExecutor):
    """Remembers the plans that it ran."""

    def __init__(self, programs: tuple[Program, ...], **sizes: Any) -> None:
        super().__init__(programs, **sizes)
        self.plans: list[StepPlan] = []

    def submit(self, plan: StepPlan) -> StepResult:
        self.plans.append(plan)
        return super().submit(plan)


class Rig:
    """A scheduler of four slots, a simulated device, and steps in flight between them."""

    def __init__(
        self,
        config: SchedulerConfig | None = None,
        *,
        num_slots: int = 4,
        num_pages: int = 100,
        max_model_len: int = 100,
        programs: tuple[Program, ...] = PROGRAMS,
        model: SimulatedModel = ENDLESS,
        max_processor_rows: int = 8,
        policy: Policy = FIRST_COME_FIRST_SERVED,
        cache: KVCache | None = None,
    ) -> None:
        self.model = model
        self.scheduler = Scheduler(
            config or SchedulerConfig(),
            cache=cache or KVCache(single_group(4), num_pages),
            num_slots=num_slots,
            max_model_len=max_model_len,
            programs=programs,
            max_processor_rows=max_processor_rows,
            policy=policy,
        )
        self.executor = Recording(
            programs,
            num_slots=num_slots,
            num_pages=num_pages,
            page_size=4,
            model=model,
            max_processor_rows=max_processor_rows,
            pages_per_slot=-(-max_model_len // 4),
        )
        self.pipeline = Pipeline(self.scheduler, self.executor)
        self.outputs: dict[str, list[int]] = {}
        self.finished: dict[str, FinishReason] = {}
        self.now_s = 0.0

    def add(
        self, name: str, prompt: int = 3, max_tokens: int = 4, priority: int = 0, **sampling: object
    ) -> Request:
        request = Request(
            id=name,
            prompt=tuple((i * i + len(name)) % self.model.vocab for i in range(prompt)),
            sampling=SamplingParams(max_tokens=max_tokens, **sampling),  # pyright: ignore
            priority=priority,
        )
        self.scheduler.add(request, self.now_s)
        return request

    @property
    def in_flight(self) -> list[StepPlan]:
        """Plans that are submitted and not committed, the oldest first."""
        plans = self.executor.plans
        return plans[len(plans) - self.pipeline.num_in_flight :]

    def plan(self) -> StepPlan:
        plan = self.pipeline.start(self.now)
        assert plan is not None
        return plan

    def commit(self) -> list[SequenceUpdate]:
        updates = self.pipeline.finish(self.now)
        self.note(updates)
        return updates

    def step(self) -> tuple[StepPlan, list[SequenceUpdate]]:
        plan = self.plan()
        return plan, self.commit()

    def run(self, depth: int = 1) -> list[StepPlan]:
        """Until nothing is left, with `depth` steps in flight."""
        num_before = len(self.executor.plans)
        self.pipeline.depth = depth
        while self.scheduler.has_work:
            self.note(self.pipeline.turn(self.now) or [])
        return self.executor.plans[num_before:]

    def now(self) -> float:
        return self.now_s

    def note(self, updates: list[SequenceUpdate]) -> None:
        for update in updates:
            self.outputs.setdefault(update.request_id, []).extend(update.tokens)
            if update.finish is not None:
                self.finished[update.request_id] = update.finish

    def is_empty(self) -> bool:
        stats = self.scheduler.stats()
        return (
            stats.num_waiting == stats.num_running == 0
            and stats.free_slots == 4
            and stats.free_pages == 100
        )


def names(plan: StepPlan) -> list[str]:
    return [chunk.request_id for chunk in plan.chunks]


def admitted(plan: StepPlan) -> list[str]:
    return [admission.request.id for admission in plan.admissions]


# What is refused.


def test_a_prompt_that_leaves_no_room_for_a_token_is_refused() -> None:
    rig = Rig(max_model_len=10)
    with pytest.raises(PromptTooLong, match="10 tokens"):
        rig.add("a", prompt=10)
    request = rig.add("b", prompt=9, max_tokens=50)
    rig.run()
    assert rig.outputs["b"] == rig.model.generate(request, 10)[0]
    assert len(rig.outputs["b"]) == 1
    assert rig.finished["b"] is FinishReason.LENGTH


def test_a_request_that_needs_more_pages_than_there_are_is_refused() -> None:
    rig = Rig(num_pages=3)  # 12 positions; the last token needs none
    with pytest.raises(PromptTooLong, match="4 pages"):
        rig.add("a", prompt=10, max_tokens=4)
    rig.add("b", prompt=10, max_tokens=3)
    rig.run()
    assert len(rig.outputs["b"]) == 3


def test_an_id_is_free_again_once_its_sequence_has_ended() -> None:
    rig = Rig()
    rig.add("a")
    with pytest.raises(RequestError, match="'a' is in use"):
        rig.add("a")
    rig.plan()
    assert rig.scheduler.abort("a")
    again = rig.add("a", prompt=7, max_tokens=2)  # while a step of the first is in flight
    assert rig.commit() == []
    rig.run()
    assert rig.outputs["a"] == rig.model.generate(again, 100)[0]


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "param"), [(0, 1, "prompt"), (1, 0, "max_tokens")]
)
def test_empty_requests_are_refused(prompt: int, max_tokens: int, param: str) -> None:
    with pytest.raises(RequestError) as error:
        Rig().add("a", prompt, max_tokens)
    assert error.value.param == param


def test_a_full_queue_says_when_to_come_back() -> None:
    rig = Rig(SchedulerConfig(max_queue=2))
    rig.add("a")
    rig.add("b")
    with pytest.raises(Overloaded) as error:
        rig.add("c")
    assert 1 <= error.value.retry_after_s <= 30
    rig.step()
    rig.add("c")


def test_retry_after_follows_the_rate_at_which_sequences_leave() -> None:
    rig = Rig(SchedulerConfig(max_queue=9))
    for i in range(9):
        rig.add(str(i), max_tokens=1)
        rig.now_s += 0.5
        rig.step()  # two leave per second
    for i in range(9):
        rig.add(str(i))
    with pytest.raises(Overloaded) as error:
        rig.add("late")
    assert error.value.retry_after_s == pytest.approx(4.5)


def test_a_draining_engine_finishes_what_it_has() -> None:
    rig = Rig()
    rig.add("a")
    rig.scheduler.drain()
    with pytest.raises(Unavailable):
        rig.add("b")
    rig.run()
    assert rig.finished == {"a": FinishReason.LENGTH}


# Steps.


def test_decodes_go_first_and_are_never_stalled_by_a_prompt() -> None:
    rig = Rig(SchedulerConfig(step_tokens=8))
    rig.add("a", max_tokens=50)
    rig.add("b", max_tokens=50)
    rig.step()
    rig.add("long", prompt=20, max_tokens=2)
    lengths: list[int] = []
    for _ in range(4):
        plan, updates = rig.step()
        assert names(plan) == ["a", "b", "long"]
        assert {"a", "b"} <= {update.request_id for update in updates}
        assert plan.program is MIXED_8
        lengths.append(plan.chunks[2].num_tokens)
    assert lengths == [6, 6, 6, 2]
    assert rig.outputs["long"] != []


def test_the_smallest_program_that_holds_the_step_is_used() -> None:
    rig = Rig()
    rig.add("a", prompt=8, max_tokens=40)
    assert rig.step()[0].program is MIXED_8
    rig.add("b", prompt=8, max_tokens=40)
    assert rig.step()[0].program is MIXED_32
    assert rig.step()[0].program is DECODE_2
    rig.add("c", prompt=1, max_tokens=40)
    assert rig.step()[0].program is MIXED_8
    assert rig.step()[0].program is DECODE_4


def test_without_a_wide_program_decodes_run_in_a_mixed_program() -> None:
    rig = Rig(programs=(MIXED_8, DECODE_2))
    requests = [rig.add(name) for name in "abc"]
    plans = rig.run(depth=2)
    assert all(plan.program is MIXED_8 for plan in plans if len(plan.chunks) > 2)
    assert rig.outputs == {r.id: rig.model.generate(r, 100)[0] for r in requests}


def test_decode_runs_end_with_the_longest_need_while_nobody_waits() -> None:
    rig = Rig()
    rig.add("a", max_tokens=3)
    rig.add("b", max_tokens=13)
    rig.step()
    steps = [plan.num_steps for plan in rig.run()]
    assert steps == [8, 4]


def test_decode_runs_end_with_the_shortest_need_while_somebody_waits() -> None:
    rig = Rig()
    for i, max_tokens in enumerate((4, 9, 20, 20)):
        rig.add(str(i), max_tokens=max_tokens)
    rig.step()
    rig.add("next", max_tokens=1)
    assert rig.plan().num_steps == 3
    # The slot is taken over before the run that ends its owner is committed.
    assert admitted(rig.plan()) == ["next"]


def test_configured_runs_are_shorter_than_the_program() -> None:
    rig = Rig(SchedulerConfig(decode_steps=3))
    rig.add("a", max_tokens=8)
    assert [plan.num_steps for plan in rig.run()] == [1, 3, 3, 1]


@pytest.mark.parametrize(("wait_s", "steps"), [(0.0, 8), (0.25, 2), (0.01, 1)])
def test_decode_runs_hold_an_arrival_up_no_longer_than_configured(
    wait_s: float, steps: int
) -> None:
    rig = Rig(SchedulerConfig(decode_wait_s=wait_s))
    rig.add("a", max_tokens=40)
    rig.step()
    for _ in range(3):
        plan = rig.plan()
        rig.now_s += plan.num_steps * 0.05
        rig.commit()
    assert rig.plan().num_steps == steps  # twice as many of 50 ms fit


def test_short_pages_shorten_the_run_before_they_preempt() -> None:
    rig = Rig(num_pages=4)
    rig.add("a", prompt=3, max_tokens=9)
    rig.add("b", prompt=3, max_tokens=6)
    steps = [plan.num_steps for plan in rig.run()]
    assert steps[0] == 1
    assert steps[1] == 4  # 8 would take two more pages each
    assert rig.scheduler.stats().num_preemptions == 0


def test_one_token_requests_end_in_their_first_step() -> None:
    rig = Rig()
    request = rig.add("a", max_tokens=1)
    plan = rig.plan()
    assert plan.program.kind is ProgramKind.MIXED
    assert rig.scheduler.plan(0.0) is None
    assert rig.scheduler.stats().free_slots == 4  # its slot is free before it has ended
    assert rig.scheduler.stats().num_running == 1
    [update] = rig.commit()
    assert update.finish is FinishReason.LENGTH
    assert list(update.tokens) == rig.model.generate(request, 100)[0]
    assert rig.is_empty()


def test_queue_time_runs_to_the_first_admission() -> None:
    rig = Rig()
    rig.now_s = 3.0
    rig.add("a")
    rig.now_s = 5.5
    _, [first] = rig.step()
    rig.now_s = 9.0
    _, [second] = rig.step()
    assert (first.queue_s, second.queue_s) == (2.5, None)


# The end of a sequence.


def stopping_at(output: int) -> tuple[SimulatedModel, dict[str, object]]:
    """A model that stops the request of `stop_rig` at its output token number `output`."""
    request = Rig().add("a", prompt=5, max_tokens=30)
    tokens, _ = ENDLESS.generate(request, 100)
    stop = tokens[output]
    assert stop not in tokens[:output]
    return ENDLESS, {"stop_token_ids": (stop,)}


def test_a_stop_at_the_first_token() -> None:
    model, stop = stopping_at(0)
    rig = Rig(model=model)
    rig.add("a", prompt=5, max_tokens=30, **stop)
    rig.plan()
    rig.plan()  # decodes it, not knowing better
    [update] = rig.commit()
    assert update.finish is FinishReason.STOP
    assert len(update.tokens) == 1
    assert rig.is_empty()
    assert rig.commit() == []


def test_what_is_in_flight_past_a_finish_is_dropped_and_its_slot_reused() -> None:
    model, stop = stopping_at(4)
    rig = Rig(model=model)
    rig.add("a", prompt=5, max_tokens=30, **stop)
    rig.step()
    run = rig.plan()
    assert run.num_steps == 8
    rig.plan()
    [update] = rig.commit()
    assert update.finish is FinishReason.STOP
    assert len(update.tokens) == 4
    follower = rig.add("b", max_tokens=6)
    assert rig.plan().admissions[0].slot == run.chunks[0].slot
    assert rig.commit() == []
    rig.run()
    assert rig.outputs["b"] == rig.model.generate(follower, 100)[0]
    assert rig.is_empty()


@pytest.mark.parametrize("steps_before", [0, 1, 2, 3])
@pytest.mark.parametrize("in_flight", [0, 1, 2])
def test_an_abort_frees_at_once_and_silences(steps_before: int, in_flight: int) -> None:
    rig = Rig(SchedulerConfig(step_tokens=4, decode_steps=2))
    rig.add("a", prompt=9, max_tokens=20)  # three chunks, then decode runs
    for _ in range(steps_before):
        rig.step()
    for _ in range(in_flight):
        rig.plan()
    assert rig.scheduler.abort("a")
    assert not rig.scheduler.abort("a")
    assert rig.is_empty()
    assert not rig.scheduler.has_work
    assert rig.scheduler.plan(0.0) is None
    while rig.in_flight:
        assert rig.commit() == []
    assert rig.scheduler.stats().num_aborted == 1


def test_an_abort_of_a_sequence_whose_last_token_is_in_flight() -> None:
    rig = Rig()
    rig.add("a", max_tokens=1)
    rig.plan()
    assert rig.scheduler.abort("a")
    assert rig.commit() == []
    assert rig.is_empty()


def test_unknown_ids_are_ignored() -> None:
    assert not Rig().scheduler.abort("nobody")


def test_an_engine_failure_ends_everything() -> None:
    rig = Rig()
    for name in "abcde":
        rig.add(name, max_tokens=9)
    rig.step()
    rig.plan()
    updates = rig.scheduler.fail_all("the device is gone")
    assert sorted(update.request_id for update in updates) == list("abcde")
    assert {update.finish for update in updates} == {FinishReason.ERROR}
    assert {update.error for update in updates} == {"the device is gone"}
    assert rig.is_empty()
    assert not rig.scheduler.has_work
    assert rig.scheduler.num_in_flight == 0


# Who goes first.


def test_admission_is_by_priority_then_arrival() -> None:
    rig = Rig(num_slots=4, programs=(MIXED_8, DECODE_4), config=SchedulerConfig(step_tokens=4))
    for name, priority in (("late", 1), ("a", 0), ("b", 0), ("urgent", -1)):
        rig.add(name, prompt=4, max_tokens=1, priority=priority)
    order = [name for plan in rig.run() for name in admitted(plan)]
    assert order == ["urgent", "a", "b", "late"]


def test_a_head_that_does_not_fit_is_not_overtaken() -> None:
    rig = Rig(num_pages=10)
    rig.add("a", prompt=20, max_tokens=9)
    rig.add("big", prompt=24, max_tokens=9)
    rig.add("small", prompt=1, max_tokens=1)
    assert admitted(rig.step()[0]) == ["a"]
    order = [name for plan in rig.run() for name in admitted(plan)]
    assert order == ["big", "small"]


def test_a_newcomer_waits_for_room_to_grow() -> None:
    rig = Rig(SchedulerConfig(headroom_pages=2), num_pages=6)
    rig.add("a", prompt=8, max_tokens=9)
    rig.step()
    rig.add("b", prompt=12, max_tokens=2)  # 4 pages are free, b takes 3, a may want 2 more
    assert admitted(rig.step()[0]) == []
    rig.run()
    assert rig.scheduler.stats().num_preemptions == 0
    assert set(rig.finished) == {"a", "b"}


def test_rows_with_token_rules_are_admitted_a_few_at_a_time() -> None:
    rig = Rig(max_processor_rows=1)
    rig.add("a", bad_token_ids=(1,))
    rig.add("b", logit_bias=((1, 1.0),))
    rig.add("c")
    assert [admitted(rig.step()[0]) for _ in range(2)] == [["a"], ["b", "c"]]


def test_with_two_partial_prompts_a_short_one_passes_a_long_one() -> None:
    rig = Rig(SchedulerConfig(step_tokens=8, max_partial_prefills=2))
    rig.add("long", prompt=30, max_tokens=1)
    rig.add("short", prompt=3, max_tokens=1)
    rig.add("third", prompt=30, max_tokens=1)
    plan, updates = rig.step()
    # A fair half each, and to the first what the second left over; nothing for a third.
    assert [(c.request_id, c.num_tokens) for c in plan.chunks] == [
        ("long", 4),
        ("short", 3),
        ("third", 1),
    ]
    assert [update.request_id for update in updates] == ["short"]
    assert sum(chunk.num_tokens for chunk in rig.step()[0].chunks) == 8


def test_what_one_prompt_leaves_of_its_share_goes_to_another() -> None:
    rig = Rig(SchedulerConfig(step_tokens=8, max_partial_prefills=2))
    rig.add("long", prompt=30, max_tokens=1)
    rig.add("short", prompt=3, max_tokens=1)
    assert [chunk.num_tokens for chunk in rig.plan().chunks] == [5, 3]


def test_a_prompt_without_a_share_waits_and_preempts_nobody() -> None:
    programs = (Program(ProgramKind.MIXED, 8, 5), Program(ProgramKind.DECODE, 5, 5, 8))
    config = SchedulerConfig(step_tokens=5, max_partial_prefills=3)
    rig = Rig(config, num_slots=5, programs=programs)
    rig.add("brief", prompt=1, max_tokens=3, priority=1)
    rig.add("low", prompt=1, max_tokens=50, priority=1)
    rig.step()
    for name in "abc":
        rig.add(name, prompt=20, max_tokens=1)
    chunks = [[(c.request_id, c.num_tokens) for c in rig.step()[0].chunks] for _ in range(3)]
    assert chunks[1] == [("brief", 1), ("low", 1), ("a", 1), ("b", 1), ("c", 1)]
    assert chunks[2] == [("low", 1), ("a", 2), ("b", 2)]  # four tokens, two for each
    rig.run()
    assert rig.scheduler.stats().num_preemptions == 0
    assert len(rig.finished) == 5


def test_one_partial_prompt_is_finished_before_the_next_is_begun() -> None:
    rig = Rig(SchedulerConfig(step_tokens=8))
    rig.add("long", prompt=12, max_tokens=1)
    rig.add("next", prompt=12, max_tokens=1)
    chunks = [(c.request_id, c.num_tokens) for plan in rig.run() for c in plan.chunks]
    assert chunks == [("long", 8), ("long", 4), ("next", 4), ("next", 8)]


# Preemption.


def crowded() -> tuple[Rig, dict[str, list[int]]]:
    """Three sequences that outgrow the pages while they decode."""
    rig = Rig(SchedulerConfig(headroom_pages=0), num_pages=9)
    requests = [rig.add(name, prompt=6, max_tokens=18) for name in "abc"]
    return rig, {r.id: rig.model.generate(r, 100)[0] for r in requests}


def test_the_latest_arrival_is_preempted_and_keeps_its_place() -> None:
    rig, expected = crowded()
    plans: list[StepPlan] = []
    while rig.scheduler.stats().num_preemptions == 0:
        plans.append(rig.step()[0])
    assert names(plans[-1]) == ["a", "b"]  # c, the latest, had to go
    rig.add("late", prompt=1, max_tokens=1)
    plans = rig.run()
    order = [(a.request.id, bool(a.output)) for plan in plans for a in plan.admissions]
    # a needs the pages of b, too; then each comes back in the order of arrival (c even twice).
    assert order[:2] == [("b", True), ("c", True)]
    assert order[-1] == ("late", False)
    assert {name: rig.outputs[name] for name in expected} == expected


@pytest.mark.parametrize("depth", [1, 2])
def test_tokens_in_flight_of_the_preempted_are_not_lost(depth: int) -> None:
    rig, expected = crowded()
    plans = rig.run(depth)
    again = [a for plan in plans for a in plan.admissions if a.output]
    assert again
    for admission in again:
        assert list(admission.output) == expected[admission.request.id][: len(admission.output)]
    assert rig.outputs == expected
    assert rig.scheduler.stats().recomputed_tokens > 0


def test_the_lowest_priority_is_preempted_first() -> None:
    rig = Rig(SchedulerConfig(headroom_pages=0), num_pages=8)
    rig.add("low", prompt=6, max_tokens=18, priority=5)
    rig.step()
    rig.add("high", prompt=6, max_tokens=18)
    again = [a.request.id for plan in rig.run() for a in plan.admissions if a.output]
    assert set(again) == {"low"}


def test_a_half_computed_prompt_can_be_preempted() -> None:
    rig = Rig(SchedulerConfig(step_tokens=5, headroom_pages=0), num_pages=9)
    first = rig.add("a", prompt=4, max_tokens=30)
    rig.step()
    for _ in range(3):
        rig.step()
    late = rig.add("late", prompt=10, max_tokens=3, prompt_logprobs=1)
    plans = rig.run(depth=2)
    assert rig.outputs["a"] == rig.model.generate(first, 100)[0]
    assert rig.outputs["late"] == rig.model.generate(late, 100)[0]
    assert sum(name == "late" for plan in plans for name in admitted(plan)) >= 1


def test_a_preempted_sequence_is_not_admitted_while_a_step_of_its_is_in_flight() -> None:
    rig, expected = crowded()
    rig.step()
    while rig.scheduler.stats().num_preemptions == 0:
        rig.plan()
        if len(rig.in_flight) == 3:
            rig.commit()
    rig.scheduler.abort("a")  # now there is room for c at once
    rig.add("late", prompt=1, max_tokens=1)
    while any("c" in names(plan) for plan in rig.in_flight):
        plan = rig.plan()
        assert names(plan) == ["b"]  # late does not take the place of c
        assert plan.num_steps == 1  # and c does not wait for a long run
        rig.commit()
    plan = rig.plan()
    assert admitted(plan) == ["c", "late"]
    rig.run(depth=3)
    assert {name: rig.outputs[name] for name in "bc"} == {name: expected[name] for name in "bc"}


def test_the_first_in_rank_takes_pages_even_for_its_prompt() -> None:
    rig = Rig(SchedulerConfig(step_tokens=4, headroom_pages=0), num_pages=6)
    low = rig.add("low", prompt=5, max_tokens=19, priority=1)
    rig.step()
    rig.step()
    high = rig.add("high", prompt=15, max_tokens=2)
    # Three tokens a step; low takes the last page when high has no need of one.
    assert [names(rig.step()[0]) for _ in range(5)] == [["low", "high"]] * 4 + [["high"]]
    assert rig.scheduler.stats().num_preemptions == 1
    rig.run()
    assert rig.outputs["low"] == rig.model.generate(low, 100)[0]
    assert rig.outputs["high"] == rig.model.generate(high, 100)[0]


# Policies.


class Recorder:
    """Ranks by how much a sequence has got, and notes at which events it was asked."""

    def __init__(self) -> None:
        self.events: list[tuple[Event, str, float]] = []

    def rank(self, view: SequenceView, now_s: float) -> tuple[float, ...]:
        self.events.append((view.event, view.request.id, now_s))
        return (-view.num_output, view.arrival)


def test_a_policy_ranks_at_events_and_never_per_step() -> None:
    recorder = Recorder()
    rig = Rig(policy=Policy(rank=recorder.rank, victim=last_in_rank))
    for name in "ab":
        rig.add(name, max_tokens=40)
    rig.now_s = 3.0
    rig.run(depth=2)
    assert recorder.events == [
        (Event.ARRIVAL, "a", 0.0),
        (Event.ARRIVAL, "b", 0.0),
        (Event.FIRST_OUTPUT, "a", 3.0),
        (Event.FIRST_OUTPUT, "b", 3.0),
    ]


@pytest.mark.parametrize("depth", [1, 2])
def test_ranks_that_change_at_every_event_lose_nobody(depth: int) -> None:
    recorder = Recorder()
    rig = Rig(
        SchedulerConfig(headroom_pages=0),
        num_pages=9,
        policy=Policy(rank=recorder.rank, victim=last_in_rank),
    )
    requests = [rig.add(name, prompt=6, max_tokens=18) for name in "abcdefg"]
    rig.run(depth)
    assert rig.outputs == {r.id: rig.model.generate(r, 100)[0] for r in requests}
    assert {event for event, _, _ in recorder.events} >= {Event.FIRST_OUTPUT, Event.PREEMPTION}
    assert rig.scheduler.stats().free_pages == 9


def test_the_policy_chooses_the_victim() -> None:
    def first_behind(running: RankedQueue, for_seq: Sequence) -> Sequence:
        behind = [seq for seq in running if seq.rank > for_seq.rank]
        return behind[0] if behind else for_seq

    policy = Policy(rank=FIRST_COME_FIRST_SERVED.rank, victim=first_behind)
    rig = Rig(SchedulerConfig(headroom_pages=0), num_pages=9, policy=policy)
    requests = [rig.add(name, prompt=6, max_tokens=18) for name in "abc"]
    plans: list[StepPlan] = []
    while rig.scheduler.stats().num_preemptions == 0:
        plans.append(rig.step()[0])
    assert names(plans[-1]) == ["a", "c"]  # the last in rank stays
    rig.run(depth=2)
    assert rig.outputs == {r.id: rig.model.generate(r, 100)[0] for r in requests}


def test_a_victim_before_the_one_that_lacks_pages_is_refused() -> None:
    policy = Policy(
        rank=FIRST_COME_FIRST_SERVED.rank, victim=lambda running, for_seq: running.first
    )
    rig = Rig(SchedulerConfig(headroom_pages=0), num_pages=8, policy=policy)
    for name, prompt in (("a", 4), ("b", 6)):
        rig.add(name, prompt=prompt, max_tokens=18)
    with pytest.raises(ValueError, match="preempts a, which is not behind b"):
        rig.run()


# Hits.


class KeepingCache(KVCache):
    """Keeps what a sequence computed, for itself alone, as if its pages were moved out and in."""

    def __init__(self, num_pages: int = 100) -> None:
        super().__init__(single_group(4), num_pages)
        self.kept: dict[tuple[int, ...], tuple[int, ...]] = {}
        self.refuses = False  # no page is free until somebody is preempted

    def match(self, request: Request, tokens: tuple[int, ...]) -> Hit:
        ids = self.kept.get(tokens[:-1])
        return NO_HIT if ids is None else Hit(len(tokens) - 1, (ids,), len(ids))

    def adopt(self, hit: Hit) -> tuple[Pages, PageDelta]:
        pages = super().adopt(hit)
        if hit.num_pages:
            self._pool.release(hit.tables[0])
        return pages

    def grow(self, pages: Pages, num_tokens: int) -> PageDelta | None:
        if self.refuses and num_tokens > pages.capacity:
            return None
        return super().grow(pages, num_tokens)

    def release(self, pages: Pages, tokens: tuple[int, ...]) -> None:
        self.refuses = False
        ids = tuple(pages.tables[0][: self.pages_for(len(tokens))])
        self._pool.share(ids)
        self.kept[tokens] = ids
        super().release(pages, tokens)


def preempted(**sampling: object) -> tuple[Rig, Request]:
    """Two sequences, of which the second was just preempted and can come back at once."""
    cache = KeepingCache()
    rig = Rig(SchedulerConfig(decode_steps=1), cache=cache, max_processor_rows=2)
    rig.add("a", prompt=4, max_tokens=30)
    second = rig.add("b", prompt=4, max_tokens=30, **sampling)
    while len(rig.outputs.get("b", ())) < 5:
        rig.step()
    cache.refuses = True
    assert names(rig.step()[0]) == ["a"]
    assert rig.scheduler.stats().num_preemptions == 1
    return rig, second


def test_a_sequence_of_which_only_the_last_token_is_missing_starts_with_a_decode_row() -> None:
    rig, second = preempted()
    plan, _ = rig.step()
    [admission] = plan.admissions
    assert admission.num_computed == 4 + 5 - 1
    assert admission.last_token == admission.output[-1]
    assert names(plan) == ["a", "b"]
    assert [chunk.tokens for chunk in plan.chunks] == [(), ()]
    assert plan.program.kind is ProgramKind.MIXED
    rig.run(depth=2)
    assert rig.outputs["b"] == rig.model.generate(second, 100)[0]


@pytest.mark.parametrize(("pairs", "num_computed"), [(3, 8), (2, 0)])
def test_a_history_that_fits_into_no_step_is_computed_again(
    monkeypatch: pytest.MonkeyPatch, pairs: int, num_computed: int
) -> None:
    monkeypatch.setattr(step, "HISTORY_PAIRS", pairs)  # five tokens in two rows, or in three
    rig, second = preempted(presence_penalty=0.5)
    [admission] = rig.step()[0].admissions
    assert admission.num_computed == num_computed
    rig.run()
    assert rig.outputs["b"] == rig.model.generate(second, 100)[0]


def after_a_long_prompt() -> Rig:
    """The first 40 tokens of every prompt are known; a sequence has 44 at most."""
    cache = SharingCache(4, 100, seed=0, keep=1.0)
    rig = Rig(max_model_len=44, cache=cache)
    rig.add("a", prompt=41, max_tokens=1)
    rig.run()
    return rig


def test_hits_shorten_prompts_and_free_pages_stay_free() -> None:
    rig = after_a_long_prompt()
    request = rig.add("b", prompt=41, max_tokens=3)
    plan, _ = rig.step()
    assert [(c.start, c.num_tokens, c.max_new) for c in plan.chunks] == [(40, 1, 1)]
    assert [(new.first, len(new.ids)) for new in plan.chunks[0].pages] == [(0, 11)]
    assert rig.scheduler.stats().free_pages == 100 - 11
    rig.run()
    assert rig.outputs["b"] == rig.model.generate(request, 100)[0]
    assert rig.scheduler.audit().problems == ()


def test_a_step_takes_the_pages_of_one_long_hit() -> None:
    rig = after_a_long_prompt()
    requests = [rig.add(name, prompt=41, max_tokens=3) for name in "bcd"]
    assert [admitted(rig.step()[0]) for _ in range(3)] == [["b"], ["c"], ["d"]]
    rig.run()
    for request in requests:
        assert rig.outputs[request.id] == rig.model.generate(request, 100)[0]


def test_prompt_logprobs_are_computed_though_the_prompt_is_known() -> None:
    rig = after_a_long_prompt()
    rig.add("b", prompt=41, max_tokens=1, prompt_logprobs=1)
    plans = rig.run()
    assert plans[0].admissions[0].num_computed == 0
    assert sum(len(chunk.prompt_targets) for plan in plans for chunk in plan.chunks) == 40


def test_the_whole_prompt_is_never_a_hit() -> None:
    cache = KeepingCache()
    cache.match = lambda request, tokens: Hit(len(tokens))
    rig = Rig(cache=cache)
    rig.add("a")
    with pytest.raises(ValueError, match="a hit of 3 tokens leaves none to compute"):
        rig.plan()


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


# What a device may and may not answer.


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


# Configurations.


def test_programs_must_hold_every_slot() -> None:
    with pytest.raises(ConfigError, match=r"no mixed program holds 4 slots.*decode\[4x8\]"):
        Rig(programs=(DECODE_4, Program(ProgramKind.MIXED, 3, 3)))


def test_a_step_must_hold_a_token_for_every_slot() -> None:
    with pytest.raises(ConfigError, match="step_tokens is 3, less than the 4 slots"):
        Rig(SchedulerConfig(step_tokens=3))


@pytest.mark.parametrize(
    "values", [{"max_queue": 0}, {"decode_steps": 0}, {"headroom_pages": -1}], ids=str
)
def test_config_values_are_checked(values: dict[str, int]) -> None:
    [name] = values
    with pytest.raises(ConfigError, match=f"scheduler.{name} is"):
        SchedulerConfig(**values)


def test_counters() -> None:
    rig = Rig()
    rig.add("a", prompt=5, max_tokens=3)
    rig.add("b", prompt=2, max_tokens=9)
    rig.add("c", prompt=2, max_tokens=9)
    rig.step()
    rig.scheduler.abort("c")
    num_steps = 1 + len(rig.run())
    stats = rig.scheduler.stats()
    assert (stats.num_steps, stats.num_finished, stats.num_aborted) == (num_steps, 2, 1)
    assert (stats.prompt_tokens, stats.output_tokens) == (9, 13)
