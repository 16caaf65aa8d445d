"""The engine as a whole on a tiny model: what it generates, and what must not change it."""

from collections import deque
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jserve.core.request import FinishReason, Request, SamplingParams, SequenceUpdate
from jserve.core.step import ProgramKind, StepPlan
from tests.engine.engine_harness import CONFIG, MOVING, TINY, Harness, Outcome, note

pytestmark = pytest.mark.optimized


@pytest.fixture(scope="module")
def harness(programs_folder: Path) -> Harness:
    return Harness(config=MOVING, cache_folder=programs_folder)


def _prompt(seed: int, length: int) -> tuple[int, ...]:
    return tuple(int(t) for t in np.random.default_rng(seed).integers(2, TINY.vocab, length))


def _requests(num: int, **sampling) -> list[Request]:
    rng = np.random.default_rng(7)
    return [
        Request(
            id=f"r{i}",
            prompt=_prompt(i, int(rng.integers(1, 60))),
            sampling=SamplingParams(
                max_tokens=int(rng.integers(8, 30)), seed=i, ignore_eos=True, **sampling
            ),
        )
        for i in range(num)
    ]


def _alone(harness: Harness, requests: list[Request]) -> dict[str, Outcome]:
    return {request.id: harness.run([request])[request.id] for request in requests}


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    x = logits.astype(np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def test_greedy_text_is_that_of_a_dense_forward(harness: Harness) -> None:
    requests = _requests(9, temperature=0.0)
    outcomes = harness.run(requests, arrivals=[0, 0, 1, 2, 2, 2, 9, 9, 20])
    for request in requests:
        expected = harness.greedy(request.prompt, request.sampling.max_tokens)
        assert outcomes[request.id].tokens == expected
        assert outcomes[request.id].finish is FinishReason.LENGTH


def test_company_and_arrival_change_no_bit(harness: Harness) -> None:
    """Sampled tokens, and the raw log-probabilities to the last bit, are those of a lone run."""
    requests = _requests(8, temperature=1.0, logprobs=5)
    alone = _alone(harness, requests)
    for arrivals in ([0] * 8, [0, 3, 3, 5, 8, 13, 21, 21]):
        assert harness.run(requests, arrivals) == alone
    assert len({tuple(outcome.tokens[:6]) for outcome in alone.values()}) > 4


def test_without_overlap_nothing_changes(harness: Harness) -> None:
    requests = _requests(6, temperature=0.8, top_p=0.9)
    expected = harness.run(requests)
    assert harness.run(requests, [0, 1, 2, 3, 4, 5], overlap=False) == expected


def test_preemption_loses_no_token_and_no_sampler_state(harness: Harness) -> None:
    requests = _requests(
        8, temperature=1.0, repetition_penalty=1.3, frequency_penalty=0.4, presence_penalty=0.2
    )
    expected = _alone(harness, requests)
    scheduler = harness.scheduler_with(num_pages=13)
    outcomes = harness.run(requests, scheduler=scheduler)
    assert scheduler.stats().num_preemptions >= 2
    assert scheduler.stats().free_pages == 13
    assert {id_: o.tokens for id_, o in outcomes.items()} == {
        id_: o.tokens for id_, o in expected.items()
    }


def test_seed_and_choice_decide(harness: Harness) -> None:
    def draw(seed: int, choice: int) -> list[int]:
        sampling = SamplingParams(max_tokens=24, seed=seed, ignore_eos=True)
        request = Request(id="x", prompt=(5, 6, 7), sampling=sampling, choice=choice)
        return harness.run([request])["x"].tokens

    draws = {(seed, choice): draw(seed, choice) for seed in (1, -1, 2**62) for choice in (0, 1)}
    assert len({tuple(tokens) for tokens in draws.values()}) == 6
    assert draw(-1, 1) == draws[-1, 1]


def test_logprobs_are_raw_and_right(harness: Harness) -> None:
    sampling = SamplingParams(
        max_tokens=12,
        temperature=0.7,
        top_k=3,
        logprobs=4,
        prompt_logprobs=2,
        ignore_eos=True,
        frequency_penalty=1.0,
    )
    request = Request(id="x", prompt=_prompt(3, 75), sampling=sampling)  # several chunks
    outcome = harness.run([request, *_requests(5)])["x"]
    tokens = [*request.prompt, *outcome.tokens]
    expected = _log_softmax(harness.dense_logits(tokens))
    assert outcome.prompt_logprobs is not None
    assert outcome.prompt_logprobs[0] is None
    found = [*outcome.prompt_logprobs[1:], *outcome.logprobs]
    assert len(found) == len(tokens) - 1
    for position, entry in enumerate(found):
        row, token = expected[position], tokens[position + 1]
        assert entry is not None
        assert entry.token_id == token
        assert entry.logprob == pytest.approx(row[token], abs=2e-5)
        assert entry.rank == 1 + (row > row[token]).sum()
        best = np.argsort(-row, kind="stable")
        num = 2 if position < len(request.prompt) - 1 else 4
        assert [id_ for id_, _ in entry.top] == best[:num].tolist()
        np.testing.assert_allclose([lp for _, lp in entry.top], row[best[:num]], atol=2e-5)


def test_prompt_logprobs_survive_preemption(harness: Harness) -> None:
    requests = _requests(6, temperature=0.0, prompt_logprobs=1)
    expected = _alone(harness, requests)
    scheduler = harness.scheduler_with(num_pages=13)
    outcomes = harness.run(requests, scheduler=scheduler)
    assert scheduler.stats().num_preemptions > 0
    for request in requests:
        assert outcomes[request.id].prompt_logprobs == expected[request.id].prompt_logprobs


def test_penalties_against_numpy(harness: Harness) -> None:
    """Greedy under penalties, step by step as vLLM defines them, on dense logits."""
    sampling = SamplingParams(
        max_tokens=25,
        temperature=0.0,
        repetition_penalty=1.4,
        presence_penalty=0.5,
        frequency_penalty=0.3,
        ignore_eos=True,
        logit_bias=((9, 1.5), (11, -3.0)),
        bad_token_ids=(20, 21),
    )
    request = Request(id="x", prompt=_prompt(11, 33), sampling=sampling)
    got = harness.run([request, *_requests(4)])["x"].tokens
    output: list[int] = []
    for token in got:
        logits = harness.dense_logits([*request.prompt, *output])[-1].astype(np.float64)
        logits[[20, 21]] = -np.inf
        for id_, bias in sampling.logit_bias:
            logits[id_] += bias
        seen = np.zeros(TINY.vocab, bool)
        seen[[*request.prompt, *output]] = True
        scaled = np.where(logits > 0, logits / 1.4, logits * 1.4)
        logits = np.where(seen, scaled, logits)
        counts = np.bincount(output, minlength=TINY.vocab)
        logits -= 0.3 * counts + 0.5 * (counts > 0)
        best = np.sort(logits)[-2:]
        assert best[1] - best[0] > 1e-4, "the case is too close to tell"
        assert token == int(np.argmax(logits))
        output.append(token)


def test_stop_ids_minimum_and_end_of_sequence(harness: Harness) -> None:
    free = SamplingParams(max_tokens=40, temperature=1.0, seed=3, ignore_eos=True)
    prompt = _prompt(2, 20)
    tokens = harness.run([Request(id="x", prompt=prompt, sampling=free)])["x"].tokens
    stop = tokens[17]
    first = tokens.index(stop)

    def run(**sampling) -> Outcome:
        params = SamplingParams(max_tokens=40, temperature=1.0, seed=3, **sampling)
        return harness.run([Request(id="x", prompt=prompt, sampling=params)])["x"]

    stopped = run(stop_token_ids=(stop, 95), ignore_eos=True)
    assert (stopped.tokens, stopped.finish) == (tokens[: first + 1], FinishReason.STOP)
    late = run(stop_token_ids=(stop,), min_tokens=first + 3, ignore_eos=True)
    assert stop not in late.tokens[: first + 2]
    assert late.tokens[:first] == tokens[:first]
    # The model's own end of sequence, made certain.
    ended = run(allowed_token_ids=(1, 7), logit_bias=((1, 100.0),))
    assert (ended.tokens, ended.finish) == ([1], FinishReason.STOP)
    ignored = run(allowed_token_ids=(1, 7), logit_bias=((1, 100.0),), ignore_eos=True)
    assert (len(ignored.tokens), ignored.finish) == (40, FinishReason.LENGTH)


def test_a_slot_forgets_its_last_sequence(harness: Harness) -> None:
    """Masks, biases, counts and stop ids of a finished sequence do not reach the next."""
    loud = SamplingParams(
        max_tokens=10,
        allowed_token_ids=(3, 4),
        logit_bias=((3, 50.0),),
        presence_penalty=2.0,
        stop_token_ids=(8, 9),
        min_tokens=4,
    )
    quiet = _requests(4, temperature=0.0)
    expected = _alone(harness, quiet)
    harness.run([Request(id=f"l{i}", prompt=(5, 6), sampling=loud) for i in range(8)])
    assert harness.run(quiet) == expected


def test_more_masks_than_one_step_carries(harness: Harness) -> None:
    requests = [
        Request(
            id=f"m{i}",
            prompt=_prompt(i, 4),
            sampling=SamplingParams(max_tokens=3, allowed_token_ids=(10 + i,), ignore_eos=True),
        )
        for i in range(CONFIG.processor_rows + 3)
    ]
    outcomes = harness.run(requests)
    for i, request in enumerate(requests):
        assert outcomes[request.id].tokens == [10 + i] * 3


def test_abort_frees_everything_at_once(harness: Harness) -> None:
    """New sequences take slots and pages that a step in flight still writes."""
    scheduler, executor = harness.scheduler_with(num_pages=13), harness.engine.executor
    for request in _requests(6):
        scheduler.add(request, 0.0)
    in_flight: deque[tuple[StepPlan, Any]] = deque()

    def start() -> StepPlan | None:
        plan = scheduler.plan(1.0)
        if plan is not None:
            in_flight.append((plan, executor.submit(plan)))
        return plan

    def finish() -> list[SequenceUpdate]:
        plan, handle = in_flight.popleft()
        return scheduler.commit(plan, executor.collect(handle), 1.0)

    old = [start(), start()]
    for i in range(6):
        assert scheduler.abort(f"r{i}")
    stats = scheduler.stats()
    assert (stats.free_pages, stats.free_slots) == (13, CONFIG.num_slots)
    later = [Request(id=f"n{r.id}", prompt=r.prompt, sampling=r.sampling) for r in _requests(4)]
    outcomes = {request.id: Outcome() for request in later}
    for request in later:
        scheduler.add(request, 1.0)
    assert finish() == []
    new = [start(), start()]
    assert _slots(new[:1]) & _slots(old[1:])
    assert _pages(new) & _pages(old)
    while in_flight:
        for update in finish():
            note(outcomes[update.request_id], update)
        if len(in_flight) < 2:
            start()
    assert scheduler.stats().free_pages == 13
    assert outcomes == _alone(harness, later)


def _slots(plans: list[StepPlan | None]) -> set[int]:
    return {chunk.slot for plan in plans if plan for chunk in plan.chunks}


def _pages(plans: list[StepPlan | None]) -> set[int]:
    chunks = (chunk for plan in plans if plan for chunk in plan.chunks)
    return {page for chunk in chunks for new in chunk.pages for page in new.ids}


def test_programs_update_memory_in_place(harness: Harness) -> None:
    """Donation holds: every byte of the state is aliased, and no temporary is a copy of it."""
    state_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(harness.engine.executor._state))
    kv_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(harness.engine.executor._state.kv))
    for made in harness.engine.programs:
        memory = made.call.memory_analysis()
        assert memory.alias_size_in_bytes >= state_bytes
        if made.program.kind is ProgramKind.DECODE:
            assert memory.temp_size_in_bytes < kv_bytes / 2
