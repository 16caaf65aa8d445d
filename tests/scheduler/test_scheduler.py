"""Tests of refusals, of how steps are made, and of how sequences end."""

import math
from typing import Any

import pytest

from jserve.core.errors import (
    ConfigError,
    Overloaded,
    PromptTooLong,
    RequestError,
    Unavailable,
)
from jserve.core.request import FinishReason
from jserve.core.step import Program, ProgramKind
from jserve.scheduler.config import SchedulerConfig
from jserve.scheduler.simulated_model import SimulatedModel
from tests.scheduler.rig import DECODE_2, DECODE_4, ENDLESS, MIXED_8, MIXED_32, Rig, admitted, names

# Refusals.


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


def test_a_slow_mixed_step_does_not_shorten_the_runs_after_it() -> None:
    rig = Rig(SchedulerConfig(decode_wait_s=0.25))
    rig.add("a", max_tokens=40)
    rig.step()
    for _ in range(3):
        plan = rig.plan()
        rig.now_s += plan.num_steps * 0.05
        rig.commit()
    rig.add("b", max_tokens=1)
    assert rig.plan().program.kind is ProgramKind.MIXED
    rig.now_s += 5.0
    rig.commit()
    assert rig.plan().num_steps == 2  # as before: prompts say nothing of decodes


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


# Configurations.


def test_programs_must_hold_every_slot() -> None:
    with pytest.raises(ConfigError, match=r"no mixed program holds 4 slots.*decode\[4x8\]"):
        Rig(programs=(DECODE_4, Program(ProgramKind.MIXED, 3, 3)))


def test_a_step_must_hold_a_token_for_every_slot() -> None:
    with pytest.raises(ConfigError, match="step_tokens is 3, less than the 4 slots"):
        Rig(SchedulerConfig(step_tokens=3))


@pytest.mark.parametrize(
    "values",
    [
        {"max_queue": 0},
        {"decode_steps": 0},
        {"headroom_pages": -1},
        {"decode_wait_s": math.inf},
        {"decode_wait_s": math.nan},
        {"max_retry_after_s": math.inf},
    ],
    ids=str,
)
def test_config_values_are_checked(values: dict[str, Any]) -> None:
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
