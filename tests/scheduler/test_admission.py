"""Tests of admission, of the shares of a step, of preemption, and of policies for them."""

import pytest

from jserve.core.step import Program, ProgramKind, StepPlan
from jserve.scheduler.config import SchedulerConfig
from jserve.scheduler.policy import FIRST_COME_FIRST_SERVED, Policy, last_in_rank
from jserve.scheduler.queue import RankedQueue
from jserve.scheduler.sequence import Event, Sequence, SequenceView
from tests.scheduler.rig import DECODE_4, MIXED_8, Rig, admitted, names

# Order of admission.


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


def test_a_first_output_ranks_a_sequence_again_that_was_preempted_meanwhile() -> None:
    def those_with_output_last(view: SequenceView, now_s: float) -> tuple[float, ...]:
        return (view.event is Event.FIRST_OUTPUT,)

    policy = Policy(rank=those_with_output_last, victim=last_in_rank)
    rig = Rig(SchedulerConfig(headroom_pages=0), num_pages=4, policy=policy)
    rig.add("a", prompt=3, max_tokens=9)
    rig.add("b", prompt=12, max_tokens=4)
    rig.add("c", prompt=12, max_tokens=4)
    assert names(rig.plan()) == ["a", "b"]
    assert names(rig.plan()) == ["a"]  # b lacks a page for its first token, which is in flight
    assert [seq.id for seq in rig.scheduler.audit().waiting] == ["b", "c"]
    rig.commit()
    after = rig.scheduler.audit()
    assert [seq.id for seq in after.waiting] == ["c", "b"]
    assert after.problems == ()


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


def by_priority_alone(view: SequenceView, now_s: float) -> tuple[float, ...]:
    return (view.request.priority,)


@pytest.mark.parametrize("depth", [1, 2])
def test_sequences_that_a_policy_ranks_equal_go_by_arrival(depth: int) -> None:
    policy = Policy(rank=by_priority_alone, victim=last_in_rank)
    rig = Rig(SchedulerConfig(headroom_pages=0), num_pages=9, policy=policy)
    requests = [rig.add(name, prompt=6, max_tokens=18) for name in "abcdefg"]
    plans = rig.run(depth)
    assert rig.scheduler.stats().num_preemptions > 0
    assert rig.outputs == {r.id: rig.model.generate(r, 100)[0] for r in requests}
    for plan in plans:
        # Decode rows are in the order of rank, and then the prompts are.
        decodes = [chunk.request_id for chunk in plan.chunks if not chunk.tokens]
        assert decodes == sorted(decodes)
        assert admitted(plan) == sorted(admitted(plan))


def own_victim(running: RankedQueue, for_seq: Sequence) -> Sequence:
    return for_seq


def test_a_sequence_that_is_its_own_victim_does_not_hide_the_next() -> None:
    policy = Policy(rank=FIRST_COME_FIRST_SERVED.rank, victim=own_victim)
    rig = Rig(SchedulerConfig(headroom_pages=0), num_pages=10, policy=policy)
    rig.add("a", prompt=8, max_tokens=24)
    rig.add("b", prompt=8, max_tokens=24)
    rig.add("c", prompt=6, max_tokens=24)
    plans: list[StepPlan] = []
    while rig.scheduler.stats().num_preemptions == 0:
        plans.append(rig.step()[0])
    assert names(plans[-1]) == ["a", "c"]  # b lacked a page, and c has room in those it holds


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("step_tokens", [None, 5])
def test_where_everyone_is_its_own_victim_the_first_in_rank_gets_on(
    depth: int, step_tokens: int | None
) -> None:
    policy = Policy(rank=FIRST_COME_FIRST_SERVED.rank, victim=own_victim)
    config = SchedulerConfig(headroom_pages=0, step_tokens=step_tokens)
    rig = Rig(config, num_pages=9, policy=policy)
    requests = [rig.add(name, prompt=6, max_tokens=18 + i) for i, name in enumerate("abcdefg")]
    rig.pipeline.depth = depth
    while rig.scheduler.has_work:
        first = next(iter(rig.scheduler.audit().running), None)
        num_plans = len(rig.executor.plans)
        updates = rig.pipeline.turn(rig.now)
        new = rig.executor.plans[num_plans:]
        assert new or updates is not None, "nothing runs, and nothing is in flight"
        if first is not None:
            assert first.id in names(new[0])
        rig.note(updates or [])
    assert rig.scheduler.stats().num_preemptions > 0
    assert rig.outputs == {r.id: rig.model.generate(r, 100)[0] for r in requests}
