"""The simulated device: it must refuse every plan that would harm a real one."""

import dataclasses

import numpy as np
import pytest

from jserve.core.request import FinishReason, Request, SamplingParams
from jserve.core.step import (
    Admission,
    Chunk,
    FinishCode,
    MaskRow,
    Move,
    MoveKind,
    NewPages,
    Program,
    ProgramKind,
    StepPlan,
    StepResult,
)
from jserve.scheduler.simulated_executor import SimulatedExecutor
from jserve.scheduler.simulated_model import SimulatedModel
from jserve.scheduler.simulated_pages import PlanError

MIXED = Program(ProgramKind.MIXED, 8, 2)
DECODE = Program(ProgramKind.DECODE, 2, 2, 4)
OUT, IN, COPY = MoveKind
MODEL = SimulatedModel(vocab=50, eos_token_ids=())


def device(model: SimulatedModel = MODEL, **sizes: int) -> SimulatedExecutor:
    least = {"num_slots": 2, "num_pages": 4, "page_size": 4, "max_processor_rows": 1}
    return SimulatedExecutor((MIXED, DECODE), model=model, **(least | sizes))


def request(name: str = "a", prompt: int = 3, **sampling: object) -> Request:
    params = SamplingParams(**{"max_tokens": 9, **sampling})  # pyright: ignore
    return Request(id=name, prompt=tuple(range(1, prompt + 1)), sampling=params)


def pages(*ids: int, first: int = 0) -> tuple[NewPages, ...]:
    return (NewPages(0, first, ids),)


def prompt_chunk(asked: Request, slot: int = 0, **changes: object) -> Chunk:
    chunk = Chunk(
        slot=slot,
        request_id=asked.id,
        start=0,
        num_tokens=len(asked.prompt),
        tokens=asked.prompt,
        pages=pages(slot + 1),
    )
    return chunk._replace(**changes)


def decode_chunk(start: int, slot: int = 0, name: str = "a", **changes: object) -> Chunk:
    return Chunk(slot, name, start, 1)._replace(**changes)


def first_step(*chunks: Chunk, admissions: tuple[Admission, ...]) -> StepPlan:
    return StepPlan(0, MIXED, 1, chunks, admissions)


def started(asked: Request, model: SimulatedModel = MODEL) -> tuple[SimulatedExecutor, StepResult]:
    """A device on which `asked` has its first token."""
    executor = device(model)
    plan = first_step(prompt_chunk(asked), admissions=(Admission(0, asked),))
    return executor, executor.collect(executor.submit(plan))


def test_answers_as_the_model_alone() -> None:
    asked = request(max_tokens=5)
    executor, first = started(asked)
    # Two pages hold positions 0 to 7; the fifth token is not computed.
    plan = StepPlan(1, DECODE, 4, (decode_chunk(3, max_new=4, pages=pages(2, first=1)),))
    second = executor.collect(executor.submit(plan))
    tokens = [first.tokens[0, 0], *second.tokens[0, : second.num_new[0]]]
    assert tokens == MODEL.generate(asked, 100)[0]
    assert list(second.num_new) == [4, 0]
    assert second.finish[0] == FinishCode.LENGTH


def test_freezes_a_row_that_has_stopped() -> None:
    [first, second, *_], _ = MODEL.generate(request(), 100)
    assert first != second
    asked = request(stop_token_ids=(second,))
    executor, _ = started(asked)
    plan = StepPlan(1, DECODE, 4, (decode_chunk(3, max_new=4, pages=pages(2, first=1)),))
    result = executor.collect(executor.submit(plan))
    assert (result.num_new[0], result.finish[0]) == (1, FinishCode.STOP)
    # A plan made without knowing of the stop yields nothing, and is no mistake.
    plan = StepPlan(2, DECODE, 4, (decode_chunk(7, max_new=2, pages=pages(3, first=2)),))
    result = executor.collect(executor.submit(plan))
    assert result.num_new[0] == 0


def test_min_tokens_hold_the_stop_back() -> None:
    model = SimulatedModel(vocab=50, eos_token_ids=tuple(range(25)))
    output, finish = model.generate(request(min_tokens=4, max_tokens=30), 100)
    assert finish is FinishReason.STOP
    assert len(output) > 4
    assert not set(output[:-1]) & set(model.eos_token_ids)
    output, finish = model.generate(request(ignore_eos=True, max_tokens=30), 100)
    assert (len(output), finish) == (30, FinishReason.LENGTH)


def test_logprobs_of_prompt_and_output() -> None:
    asked = request(prompt=4, logprobs=2, prompt_logprobs=1)
    executor = device()
    chunk = prompt_chunk(asked, prompt_targets=asked.prompt[1:])
    result = executor.collect(executor.submit(first_step(chunk, admissions=(Admission(0, asked),))))
    assert result.logprobs is not None
    assert result.prompt_logprobs is not None
    assert result.logprobs.token.shape == (2, 1)
    assert result.prompt_logprobs.token.shape == (8, 1)
    assert np.all(result.prompt_logprobs.rank[:3] >= 1)
    assert np.all(result.prompt_logprobs.rank[3:] == 0)


A, B = request("a"), request("b")
RULES = request("r", bad_token_ids=(1,))
IN_A, IN_B = Admission(0, A), Admission(1, B)


def mask_row(slot: int, *allowed: int) -> MaskRow:
    bits = np.zeros(64, bool)
    bits[list(allowed)] = True
    return MaskRow(slot, np.packbits(bits, bitorder="little").tobytes())


def masked_step(*masks: MaskRow) -> StepPlan:
    return StepPlan(0, MIXED, 1, (prompt_chunk(A),), (IN_A,), masks=masks)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (StepPlan(1, MIXED, 1, (prompt_chunk(A),), (IN_A,)), "out of order"),
        (StepPlan(0, Program(ProgramKind.MIXED, 9, 2), 1, (prompt_chunk(A),), (IN_A,)), "no such"),
        (first_step(admissions=()), "0 rows"),
        (StepPlan(0, MIXED, 2, (prompt_chunk(A),), (IN_A,)), "2 steps"),
        (
            first_step(
                prompt_chunk(request("a", 5)),
                prompt_chunk(request("b", 5), 1),
                admissions=(Admission(0, request("a", 5)), Admission(1, request("b", 5))),
            ),
            "10 tokens",
        ),
        (first_step(prompt_chunk(A), prompt_chunk(A), admissions=(IN_A,)), "two rows"),
        (StepPlan(0, DECODE, 1, (prompt_chunk(A, num_tokens=1),), (IN_A,)), "only decodes"),
        (first_step(prompt_chunk(A), admissions=(IN_A, IN_A)), "admitted twice"),
        (first_step(prompt_chunk(A), admissions=(IN_A, IN_B)), "without a chunk"),
        (
            first_step(
                prompt_chunk(RULES),
                prompt_chunk(RULES, 1),
                admissions=(Admission(0, RULES), Admission(1, RULES)),
            ),
            "processor rows",
        ),
        (first_step(prompt_chunk(A), admissions=()), "nobody was admitted"),
        (first_step(prompt_chunk(A, slot=2), admissions=(Admission(2, A),)), "no slot 2"),
        (first_step(prompt_chunk(B, slot=0), admissions=(IN_A,)), "holds a, not b"),
        (first_step(prompt_chunk(A, drafts=(1,)), admissions=(IN_A,)), "drafts"),
        (
            StepPlan(0, MIXED, 1, (prompt_chunk(A),), (IN_A,), masks=(mask_row(1, 32),)),
            "a mask without a row",
        ),
        (masked_step(mask_row(0, 0), mask_row(0, 0)), "two masks"),
        (masked_step(MaskRow(0, bytes(4))), "a mask of 4 bytes"),
        (masked_step(mask_row(0, 50)), "a mask of nothing"),  # there is no token 50
        (first_step(prompt_chunk(A), admissions=(Admission(0, A, adapter=7),)), "adapter 7"),
        (first_step(prompt_chunk(A, pages=pages(0)), admissions=(IN_A,)), "no page 0"),
        (first_step(prompt_chunk(A, pages=pages(5)), admissions=(IN_A,)), "no page 5"),
        (first_step(prompt_chunk(A, pages=pages(1, 1)), admissions=(IN_A,)), "a page twice"),
        (first_step(prompt_chunk(A, pages=pages()), admissions=(IN_A,)), "no page for position 0"),
        (
            first_step(prompt_chunk(A, pages=pages(1, first=1)), admissions=(IN_A,)),
            "gap or overlap",
        ),
        (first_step(prompt_chunk(A, start=1), admissions=(IN_A,)), "0 are computed"),
        (first_step(prompt_chunk(A, tokens=(9, 9, 9)), admissions=(IN_A,)), "wrong tokens"),
        (first_step(prompt_chunk(A, max_new=0), admissions=(IN_A,)), "too soon or late"),
        (first_step(prompt_chunk(A, prompt_targets=(7,)), admissions=(IN_A,)), "wrong targets"),
        (first_step(decode_chunk(0), admissions=(IN_A,)), "nothing was sampled"),
        (first_step(prompt_chunk(A), admissions=(Admission(0, A, (1,) * 9),)), "had ended"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refuses_a_wrong_plan(plan: StepPlan, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        device().submit(plan)


def test_only_tokens_of_the_mask_are_sampled() -> None:
    """As the first of the step, in the row of the mask's slot."""
    executor = device()
    plan = first_step(prompt_chunk(A), prompt_chunk(B, 1), admissions=(IN_A, IN_B))
    free = device().submit(plan).tokens[:, 0].tolist()
    result = executor.submit(dataclasses.replace(plan, masks=(mask_row(1, 7, 30, 49),)))
    assert free[0] == result.tokens[0, 0]
    assert free[1] not in (7, 30, 49)
    assert result.tokens[1, 0] in (7, 30, 49)
    executor.collect(result)
    rows = (
        decode_chunk(3, pages=pages(3, first=1), max_new=4),
        decode_chunk(3, 1, "b", pages=pages(4, first=1), max_new=4),
    )
    result = executor.submit(StepPlan(1, DECODE, 4, rows, masks=(mask_row(0, 7, 30, 49),)))
    assert result.tokens[0, 0] in (7, 30, 49)
    assert not set(result.tokens[0, 1:].tolist()) <= {7, 30, 49}
    assert result.tokens[1, 0] not in (7, 30, 49)


def test_a_row_yields_no_more_than_its_limit() -> None:
    executor = device()
    executor.collect(
        executor.submit(first_step(prompt_chunk(A), prompt_chunk(B, 1), admissions=(IN_A, IN_B)))
    )
    rows = (
        decode_chunk(3, pages=pages(3, first=1), max_new=1),
        decode_chunk(3, 1, "b", pages=pages(4, first=1), max_new=4),
    )
    result = executor.submit(StepPlan(1, DECODE, 4, rows))
    assert result.num_new[:2].tolist() == [1, 4]


@pytest.mark.parametrize(
    ("chunk", "message"),
    [
        (decode_chunk(4), "3 are computed"),
        (decode_chunk(3, pages=pages(2)), "gap or overlap"),
        (decode_chunk(3, max_new=0), "0 tokens in 4 steps"),
        (decode_chunk(3, max_new=5), "5 tokens in 4 steps"),
        (decode_chunk(3, num_tokens=2), "not one token"),
        (decode_chunk(3, max_new=4), "no page for position 4"),
    ],
)
def test_refuses_a_wrong_decode(chunk: Chunk, message: str) -> None:
    executor, _ = started(A)
    with pytest.raises(PlanError, match=message):
        executor.submit(StepPlan(1, DECODE, 4, (chunk,)))


def test_refuses_to_go_on_with_pages_that_were_given_away() -> None:
    executor, _ = started(A)
    executor.submit(StepPlan(1, MIXED, 1, (prompt_chunk(B, slot=1, pages=pages(1)),), (IN_B,)))
    with pytest.raises(PlanError, match="page 1 was given to another"):
        executor.submit(StepPlan(2, DECODE, 1, (decode_chunk(3),)))


def test_refuses_to_give_a_page_away_that_the_same_step_uses() -> None:
    executor, _ = started(A)
    thief = prompt_chunk(B, slot=1, pages=pages(1))
    with pytest.raises(PlanError, match="page 1 was given to another"):
        executor.submit(StepPlan(1, MIXED, 1, (decode_chunk(3), thief), (IN_B,)))


# Sequences that start with computed pages: `LONG` is computed in slot 0, pages 1 and 2.

LONG = request("long", 6)
SAME = request("same", 6)


def follow_up(start: int, *ids: int, asked: Request = SAME, slot: int = 1) -> Chunk:
    return Chunk(
        slot, asked.id, start, len(asked.prompt) - start, asked.prompt[start:], pages=pages(*ids)
    )


def computed(num_host_pages: int = 0) -> SimulatedExecutor:
    executor = device(num_host_pages=num_host_pages)
    chunk = prompt_chunk(LONG, pages=pages(1, 2))
    executor.collect(executor.submit(first_step(chunk, admissions=(Admission(0, LONG),))))
    return executor


def second_step(*chunks: Chunk, moves: tuple[Move, ...] = (), **admitted: object) -> StepPlan:
    admission = Admission(1, **{"request": SAME, **admitted})  # pyright: ignore
    return StepPlan(1, MIXED, 1, chunks, (admission,), moves)


def test_a_shared_page_is_read_by_both() -> None:
    executor = computed()
    plan = second_step(decode_chunk(6, name="long"), follow_up(4, 1, 3), num_computed=4)
    result = executor.collect(executor.submit(plan))
    assert result.tokens[1, 0] == MODEL.generate(SAME, 100)[0][0]
    assert result.tokens[0, 0] == MODEL.generate(LONG, 100)[0][1]


OTHER = Request(id="other", prompt=(9, 2, 3, 4, 5, 6), sampling=SamplingParams(max_tokens=9))


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (
            second_step(follow_up(4, 1, 3, asked=OTHER), request=OTHER, num_computed=4),
            "page 1 does not hold its token 0",
        ),
        (second_step(follow_up(4, 3, 4), num_computed=4), "page 3 does not hold its token 0"),
        (second_step(follow_up(5, 1, 2), num_computed=5), "inside of page 2, which long fills"),
        (second_step(follow_up(6, 1, 2), num_computed=6), "6 of 6 computed"),
        (second_step(follow_up(4, 1), num_computed=4), "no page for position 4"),
        (second_step(follow_up(4, 1, 3), num_computed=3), "inside of page 1, which long fills"),
        (second_step(follow_up(4, 1, 3)), "4, 0 are computed"),
        (
            second_step(decode_chunk(5, 1, "same"), num_computed=5, last_token=6),
            "6 is no last token",
        ),
        (
            second_step(decode_chunk(4, 1, "same"), output=(7,), num_computed=4, last_token=7),
            "not all are computed",
        ),
    ],
)
def test_checks_what_a_start_finds_in_its_pages(plan: StepPlan, message: str) -> None:
    executor = computed()
    with pytest.raises(PlanError, match=message):
        executor.submit(plan)


def test_a_page_that_the_same_step_computes_cannot_be_shared_yet() -> None:
    executor = device()
    plan = first_step(
        prompt_chunk(A, num_tokens=3),
        follow_up(4, 1, 3),
        admissions=(IN_A, Admission(1, SAME, num_computed=4)),
    )
    with pytest.raises(PlanError, match="page 1 does not hold"):
        executor.submit(plan)


def test_a_page_leaves_and_is_given_away_at_once_and_comes_back() -> None:
    executor = computed(num_host_pages=2)
    moves = (Move(OUT, 0, 1, 0), Move(OUT, 0, 2, 1))
    chunk = prompt_chunk(B, slot=0, pages=pages(2))
    plan = StepPlan(1, MIXED, 1, (chunk,), (Admission(0, B),), moves)
    assert executor.collect(executor.submit(plan)).landed == (0, 1)
    output = tuple(MODEL.generate(LONG, 100)[0][:1])
    back = (Move(IN, 0, 0, 3), Move(IN, 0, 1, 4), Move(COPY, 0, 3, 1))
    admission = Admission(1, LONG, output, 6, output[0])
    row = Chunk(1, "long", 6, 1, pages=pages(1, 4))
    result = executor.collect(executor.submit(StepPlan(2, MIXED, 1, (row,), (admission,), back)))
    assert result.landed == ()
    assert [*output, result.tokens[0, 0]] == MODEL.generate(LONG, 100)[0][:2]


@pytest.mark.parametrize(
    ("moves", "message"),
    [
        ((Move(IN, 0, 0, 3),), "0 has not landed"),
        ((Move(OUT, 0, 1, 0), Move(IN, 0, 0, 3)), "0 has not landed"),
        ((Move(OUT, 0, 1, 0), Move(OUT, 0, 2, 0)), "0 has not landed"),
        ((Move(OUT, 0, 1, 2),), "no host page 2"),
        ((Move(IN, 0, 2, 1),), "no host page 2"),
        ((Move(OUT, 0, 0, 1),), "no page 0"),
        ((Move(COPY, 0, 1, 5),), "no page 5"),
        ((Move(COPY, 1, 1, 2),), "no page group 1"),
        ((Move(COPY, 0, 1, 2),), "page 2 was given to another"),
    ],
)
def test_refuses_a_wrong_move(moves: tuple[Move, ...], message: str) -> None:
    executor = computed(num_host_pages=2)
    plan = StepPlan(1, MIXED, 1, (decode_chunk(6, name="long"),), moves=moves)
    with pytest.raises(PlanError, match=message):
        executor.submit(plan)


def test_a_step_has_room_for_so_many_new_pages() -> None:
    """A mixed step of 8 tokens and 2 rows: 2 + 4 pages and those of one slot, a decode step: 6."""
    executor = device(num_pages=20, pages_per_slot=3)
    chunk = prompt_chunk(A, pages=pages(*range(1, 11)))
    with pytest.raises(PlanError, match="10 new pages, more than 9"):
        executor.submit(first_step(chunk, admissions=(IN_A,)))
    executor = device(num_pages=20, pages_per_slot=3)
    executor.submit(first_step(prompt_chunk(A, pages=pages(1)), admissions=(IN_A,)))
    row = decode_chunk(3, pages=pages(*range(2, 9), first=1))
    with pytest.raises(PlanError, match="7 new pages, more than 6"):
        executor.submit(StepPlan(1, DECODE, 1, (row,)))


def test_history_takes_processor_rows() -> None:
    """One row for a start with penalties, more for an output of many tokens, none without hits."""
    asked = request("p", 6, presence_penalty=0.5, max_tokens=2000)
    assert Admission(0, asked, (1,) * 9).processor_rows == 0
    assert Admission(0, asked, (1,) * 9, num_computed=4).processor_rows == 1
    assert Admission(0, asked, (1,) * 1025, num_computed=1030, last_token=1).processor_rows == 3
    assert Admission(0, asked, (1,) * 1025, num_computed=6 + 512).processor_rows == 1
    assert Admission(0, SAME, (1,) * 9, num_computed=4).processor_rows == 0


def test_results_are_collected_in_order() -> None:
    executor = device()
    executor.submit(first_step(prompt_chunk(A), admissions=(IN_A,)))
    handle = executor.submit(StepPlan(1, DECODE, 1, (decode_chunk(3),)))
    with pytest.raises(PlanError, match="collected out of order"):
        executor.collect(handle)
