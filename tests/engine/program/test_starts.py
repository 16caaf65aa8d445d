"""Sequences that start with computed pages, on a real engine: no bit differs from a whole run."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jserve.core.request import Request, SamplingParams
from jserve.core.step import (
    Admission,
    Chunk,
    Move,
    MoveKind,
    NewPages,
    Program,
    StepPlan,
    StepResult,
)
from jserve.engine.executor import DeviceExecutor
from jserve.engine.program.batch import layout
from tests.backends import SERVED_BACKENDS
from tests.engine.engine_harness import CONFIG, MOVING, TINY, Harness

pytestmark = pytest.mark.optimized

PAGE = CONFIG.page_size
SMALL, LARGE, DECODE = CONFIG.programs()
PENALTIES = SamplingParams(
    max_tokens=40,
    temperature=1.0,
    seed=5,
    logprobs=3,
    repetition_penalty=1.4,
    presence_penalty=0.5,
    frequency_penalty=0.3,
    ignore_eos=True,
)


@pytest.fixture(scope="module", params=SERVED_BACKENDS)
def executor(request: pytest.FixtureRequest, programs_folder: Path) -> DeviceExecutor:
    harness = Harness(TINY, MOVING, backend=request.param, cache_folder=programs_folder)
    return harness.engine.executor


@pytest.fixture
def rig(executor: DeviceExecutor) -> "Rig":
    return Rig(executor)


Yield = list[tuple[int, float, bytes]]  # tokens with their logprobs and those of the best


class Rig:
    """Runs plans that a test writes. Pages hold NaN until something is computed into them."""

    def __init__(self, executor: DeviceExecutor) -> None:
        self._executor = executor
        self._step = 0
        state = executor._state
        poison = jax.tree.map(lambda pages: jnp.full_like(pages, jnp.nan).at[0].set(0), state.kv)
        executor._state = state._replace(kv=poison)

    def run(
        self,
        program: Program,
        *chunks: Chunk,
        steps: int = 1,
        admissions: Sequence[Admission] = (),
        moves: Sequence[Move] = (),
        with_history: bool = True,
    ) -> StepResult:
        plan = StepPlan(self._step, program, steps, chunks, tuple(admissions), moves=tuple(moves))
        self._step += 1
        batch = self._executor.pack(plan)
        if not with_history:
            layout(program, self._executor._shape).views(batch.buffer)["history_words"].fill(0)
        return self._executor.collect(self._executor.submit_batch(plan, batch))


def outcome(result: StepResult, row: int = 0) -> Yield:
    """Outcome of a row, with log-probabilities as bits."""
    assert result.logprobs is not None
    return [
        (
            int(result.tokens[row, n]),
            float(result.logprobs.token[row, n]),
            result.logprobs.top[row, n].tobytes(),
        )
        for n in range(int(result.num_new[row]))
    ]


def prompt_of(seed: int, length: int) -> tuple[int, ...]:
    return tuple(map(int, np.random.default_rng(seed).integers(2, TINY.vocab, length)))


def request(name: str, prompt: tuple[int, ...], sampling: SamplingParams = PENALTIES) -> Request:
    return Request(id=name, prompt=prompt, sampling=sampling)


def prompt_chunk(asked: Request, slot: int, pages: Sequence[int], start: int = 0) -> Chunk:
    tokens = asked.prompt[start:]
    return Chunk(
        slot, asked.id, start, len(tokens), tokens, 1, pages=(NewPages(0, 0, tuple(pages)),)
    )


def decode(rig: Rig, slot: int, start: int, runs: int) -> Yield:
    found: Yield = []
    for n in range(runs):
        chunk = Chunk(slot, "", start + 4 * n, 1, max_new=4)
        found += outcome(rig.run(DECODE, chunk, steps=4))
    return found


def whole(rig: Rig, asked: Request, slot: int, pages: Sequence[int], runs: int) -> Yield:
    """Prompt and 4 × `runs` decode tokens, undisturbed."""
    chunk = prompt_chunk(asked, slot, pages)
    first = outcome(rig.run(LARGE, chunk, admissions=[Admission(slot, asked)]))
    return first + decode(rig, slot, len(asked.prompt), runs)


def test_a_prefix_that_another_sequence_computed(rig: Rig) -> None:
    """Penalties count tokens of the prefix, though they never pass the device for this sequence."""
    prefix = prompt_of(1, 2 * PAGE)
    # Half of the tokens that may be sampled are in the prefix.
    few = dataclasses.replace(
        PENALTIES, repetition_penalty=20.0, allowed_token_ids=(*prefix[:6], 2, 3, 4, 6, 7, 8)
    )
    first = request("a", prefix + prompt_of(2, 5))
    second = request("b", prefix + prompt_of(3, 9), few)
    alone = whole(rig, second, 3, range(20, 27), 4)
    whole(rig, first, 0, (1, 2, 3, 4), 1)
    hit = Admission(1, second, num_computed=2 * PAGE)
    chunk = prompt_chunk(second, 1, (1, 2, *range(9, 14)), start=2 * PAGE)
    shared = outcome(rig.run(LARGE, chunk, admissions=[hit]))
    assert shared + decode(rig, 1, len(second.prompt), 4) == alone
    # With the same penalties but an empty history the answer is another one: the case can tell.
    hit = Admission(2, second, num_computed=2 * PAGE)
    chunk = prompt_chunk(second, 2, (1, 2, *range(30, 35)), start=2 * PAGE)
    forgetful = outcome(rig.run(LARGE, chunk, admissions=[hit], with_history=False))
    assert forgetful + decode(rig, 2, len(second.prompt), 4) != alone


def test_a_start_with_more_pages_than_a_step_computes(rig: Rig) -> None:
    prompt = prompt_of(4, 20 * PAGE + 4)
    asked = request("b", prompt)
    rig.run(
        LARGE,
        Chunk(2, "a", 0, 32, prompt[:32], 0, pages=(NewPages(0, 0, tuple(range(1, 5))),)),
        admissions=[Admission(2, asked)],
    )
    for start in range(32, 160, 32):
        pages = tuple(range(start // PAGE + 1, start // PAGE + 5))
        rig.run(
            LARGE,
            Chunk(
                2,
                "a",
                start,
                32,
                prompt[start : start + 32],
                0,
                pages=(NewPages(0, start // PAGE, pages),),
            ),
        )
    chunk = Chunk(2, "a", 160, 4, prompt[160:], 1, pages=(NewPages(0, 20, (21, 22)),))
    alone = outcome(rig.run(SMALL, chunk)) + decode(rig, 2, len(prompt), 2)
    hit = Admission(0, asked, num_computed=20 * PAGE)
    chunk = prompt_chunk(asked, 0, (*range(1, 21), 31, 32), start=20 * PAGE)
    assert (
        outcome(rig.run(SMALL, chunk, admissions=[hit])) + decode(rig, 0, len(prompt), 2) == alone
    )


@pytest.mark.parametrize("with_prompt", [False, True], ids=["decode row alone", "beside a prompt"])
def test_a_sequence_that_was_moved_out_and_in_starts_with_a_decode_row(
    rig: Rig, with_prompt: bool
) -> None:
    asked = request("a", prompt_of(5, 19))
    alone = whole(rig, asked, 3, range(30, 36), 4)
    before = whole(rig, asked, 0, range(1, 6), 2)
    output = tuple(token for token, *_ in before)
    num_computed = len(asked.prompt) + len(output) - 1
    held = -(-num_computed // PAGE)
    other = request("b", prompt_of(6, 20), dataclasses.replace(PENALTIES, logprobs=0))
    # The pages leave, and in the same plan another sequence writes over them.
    out = [Move(MoveKind.OUT, 0, 1 + n, 7 - n) for n in range(held)]
    chunk = prompt_chunk(other, 0, (1, 2, 3, 4))
    result = rig.run(LARGE, chunk, admissions=[Admission(0, other)], moves=out)
    assert result.landed == tuple(7 - n for n in range(held))
    decode(rig, 0, len(other.prompt), 2)
    # They come back elsewhere, two of them by way of another page, and are read at once.
    back = [Move(MoveKind.IN, 0, 7 - n, (50, 41, 42, 43, 44)[n]) for n in range(held)]
    back += [Move(MoveKind.COPY, 0, 50, 51), Move(MoveKind.COPY, 0, 51, 40)]
    again = Admission(2, asked, output, num_computed, output[-1])
    pages = (NewPages(0, 0, tuple(range(40, 47))),)
    chunks = [Chunk(2, "a", num_computed, 1, pages=pages)]
    admissions = [again]
    if with_prompt:
        third = request("c", prompt_of(7, 12))
        chunks.append(prompt_chunk(third, 1, (60, 61)))
        admissions.append(Admission(1, third))
    result = rig.run(LARGE, *chunks, admissions=admissions, moves=back)
    assert result.landed == ()
    after = outcome(result)
    assert len(after) == 1
    chunk = Chunk(2, "a", num_computed + 1, 1, max_new=4)
    after += outcome(rig.run(DECODE, chunk, steps=4))
    assert before + after == alone[: len(before) + 5]


def test_more_moves_than_the_largest_program_holds(rig: Rig) -> None:
    """Copies run in order: a chain of them carries one page along."""
    asked = request("a", prompt_of(8, PAGE + 3))
    alone = whole(rig, asked, 0, (1, 2, 3), 1)
    chain = [Move(MoveKind.COPY, 0, 1 if n == 0 else 59 + n, 60 + n) for n in range(45)]
    hit = Admission(1, asked, num_computed=PAGE)
    chunk = prompt_chunk(asked, 1, (104, 8, 9), start=PAGE)
    found = outcome(rig.run(LARGE, chunk, admissions=[hit], moves=chain))
    assert found + decode(rig, 1, len(asked.prompt), 1) == alone
