"""The simulated device: it must refuse every plan that would harm a real one."""

import numpy as np
import pytest

from jserve.core.request import FinishReason, Request, SamplingParams
from jserve.core.step import (
    Admission,
    Chunk,
    FinishCode,
    NewPages,
    Program,
    ProgramKind,
    StepPlan,
    StepResult,
)
from jserve.scheduler.simulated_executor import PlanError, SimulatedExecutor
from jserve.scheduler.simulated_model import SimulatedModel

MIXED = Program(ProgramKind.MIXED, 8, 2)
DECODE = Program(ProgramKind.DECODE, 2, 2, 4)
MODEL = SimulatedModel(vocab=50, eos_token_ids=())


def device(model: SimulatedModel = MODEL) -> SimulatedExecutor:
    return SimulatedExecutor(
        (MIXED, DECODE),
        num_slots=2,
        num_pages=4,
        page_size=4,
        model=model,
        max_processor_rows=1,
    )


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
    # What was planned without knowing yields nothing, and is no mistake.
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


@pytest.mark.parametrize(
    ("chunk", "message"),
    [
        (decode_chunk(4), "3 are computed"),
        (decode_chunk(3, pages=pages(2)), "gap or overlap"),
        (decode_chunk(3, max_new=0), "0 tokens in 4 steps"),
        (decode_chunk(3, max_new=5), "5 tokens in 4 steps"),
        (decode_chunk(3, num_tokens=2), "not one token"),
        (decode_chunk(3, max_new=2, pages=pages(2, first=1)), "yields more than 2"),
        (decode_chunk(3, max_new=4), "no page for position 4"),
    ],
)
def test_refuses_a_wrong_decode(chunk: Chunk, message: str) -> None:
    executor, _ = started(A)
    with pytest.raises(PlanError, match=message):
        executor.submit(StepPlan(1, DECODE, 4, (chunk,)))


def test_refuses_to_go_on_with_pages_that_were_given_away() -> None:
    executor, _ = started(A)
    thief = prompt_chunk(B, slot=1, pages=pages(1))
    executor.submit(StepPlan(1, MIXED, 1, (decode_chunk(3), thief), (IN_B,)))
    with pytest.raises(PlanError, match="page 1 was given to another"):
        executor.submit(StepPlan(2, DECODE, 1, (decode_chunk(4, pages=pages(2, first=1)),)))


def test_results_are_collected_in_order() -> None:
    executor = device()
    executor.submit(first_step(prompt_chunk(A), admissions=(IN_A,)))
    handle = executor.submit(StepPlan(1, DECODE, 1, (decode_chunk(3),)))
    with pytest.raises(PlanError, match="collected out of order"):
        executor.collect(handle)
