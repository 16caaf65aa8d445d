"""Sampling state: packing, counts, stop tests, and log-probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jserve.core.request import MAX_LOGPROBS, SamplingParams
from jserve.core.step import FinishCode
from jserve.model.sampling.host import host_row
from jserve.model.sampling.logprobs import prompt_logprobs
from jserve.model.sampling.sample import SamplerConfig, sample
from jserve.model.sampling.state import (
    SLOT_ROW_WORDS,
    Processor,
    admit,
    count_chunk,
    init_sampler_state,
    observe,
    reset,
    stop_code,
)
from tests.model.sampling.sampling_reference import EOS, PROMPT_LEN, build, draw


def _row(vocab=100, **params):
    return host_row(
        SamplingParams(**params), choice=3, eos_token_ids=EOS, prompt_len=PROMPT_LEN, vocab=vocab
    )


def test_host_row():
    row = _row(
        temperature=0.25,
        top_k=-1,
        top_p=0.5,
        seed=-2,
        max_tokens=7,
        min_tokens=3,
        stop_token_ids=(9, 9, 2),
        bad_token_ids=(33, 99),
        logit_bias=((4, 1.5),),
        logprobs=0,
    )
    slot = row.slot
    assert slot.reshape(1).view(np.int32).size == SLOT_ROW_WORDS
    assert (slot["temperature"], slot["top_p"], slot["top_k"]) == (0.25, 0.5, 0)
    assert slot["seed"].tolist() == [2**32 - 1, 2**32 - 2]
    assert (slot["choice"], slot["num_logprobs"]) == (3, 0)
    assert (slot["min_total"], slot["max_total"]) == (PROMPT_LEN + 3, PROMPT_LEN + 7)
    assert slot["num_stop_ids"] == 2
    assert slot["stop_ids"][:3].tolist() == [9, 2, -1]
    assert slot["processors"] == Processor.MASK | Processor.BIAS | Processor.MIN_TOKENS
    allowed = np.unpackbits(row.processors["mask"].view(np.uint8), bitorder="little")
    assert np.flatnonzero(allowed == 0).tolist() == [33, 99, *range(100, 128)]
    assert _row().processors is None
    assert _row(ignore_eos=True).slot["num_stop_ids"] == 0
    assert _row(ignore_eos=True).slot["stop_ids"][0] == EOS[0]  # still masked by min_tokens


def test_admission_writes_only_its_slots():
    state = build([SamplingParams(seed=i, top_k=i, bad_token_ids=(i,)) for i in range(4)], 100)
    row = _row(seed=9, top_k=50).slot.reshape(1).view(np.int32)
    words = jnp.asarray(np.stack([row, row]))
    after = jax.jit(admit)(state, jnp.asarray([2, 4]), words)  # 4 is padding
    assert after.top_k.tolist() == [0, 1, 50, 3]
    assert after.seed[:, 1].tolist() == [0, 1, 9, 3]
    np.testing.assert_array_equal(after.mask, state.mask)


def test_counts_after_recompute_equal_counts_after_decode():
    vocab, rng = 50, np.random.default_rng(0)
    prompt, output = rng.integers(0, vocab, 12), rng.integers(0, vocab, 9)

    count, see, forget = map(jax.jit, (count_chunk, observe, reset))

    def chunk(state, tokens, start, width=16):
        n = len(tokens)
        ids = rng.integers(0, vocab, width)  # decode tokens and padding follow the chunk
        ids[:n] = tokens
        where = np.arange(start, start + width)
        return count(
            state,
            jnp.asarray([1] * n + [0, 2, 1, 1] * 4, jnp.int32)[:width],
            jnp.asarray(ids, jnp.int32),
            jnp.asarray(where < len(prompt)),
            jnp.arange(width) < n,
        )

    decoded = chunk(init_sampler_state(3, vocab), prompt[:5], 0)
    decoded = chunk(decoded, prompt[5:], 5)
    for token in output:
        slots, live = jnp.asarray([2, 1]), jnp.asarray([False, True])
        decoded = see(decoded, slots, jnp.asarray([3, token], jnp.int32), live)
    # Preempted; another sequence used the slot; then everything is computed again.
    recomputed = chunk(decoded, rng.integers(0, vocab, 12), 0)
    recomputed = forget(recomputed, jnp.asarray([True, False, True]))
    both = np.concatenate([prompt, output])
    for start, end in ((0, 10), (10, 16), (16, 21)):
        recomputed = chunk(recomputed, both[start:end], start)
    np.testing.assert_array_equal(recomputed.output_counts, decoded.output_counts)
    np.testing.assert_array_equal(recomputed.prompt_seen, decoded.prompt_seen)
    np.testing.assert_array_equal(decoded.output_counts[1], np.bincount(output, minlength=vocab))
    assert np.flatnonzero(decoded.prompt_seen[1]).tolist() == sorted(set(prompt.tolist()))
    assert not decoded.output_counts[0].any()
    assert not decoded.output_counts[2].any()


def test_updates_of_donated_state_are_in_place():
    def update(state, keep, slots, tokens, live):
        state = reset(state, keep)
        state = count_chunk(state, slots, tokens, live, live)
        sampled = sample(jnp.zeros((4, 6400)), state, slots, tokens, live)
        return observe(state, slots, sampled.tokens, live)

    state = build([SamplingParams(repetition_penalty=1.1)] * 4, 6400)
    flags, ids = jnp.ones(4, bool), jnp.arange(4, dtype=jnp.int32)
    compiled = jax.jit(update, donate_argnums=0).lower(state, flags, ids, ids, flags).compile()
    big = state.output_counts.nbytes
    analysis = compiled.memory_analysis()
    assert analysis.alias_size_in_bytes > big
    assert "s32[4,6400]{1,0} copy(" not in compiled.as_text()
    assert "pred[4,6400]{1,0} copy(" not in compiled.as_text()


def test_stop_code():
    params = [
        SamplingParams(stop_token_ids=(7,), max_tokens=10),
        SamplingParams(stop_token_ids=(7,), max_tokens=10, ignore_eos=True),
        SamplingParams(stop_token_ids=(7,), max_tokens=10, min_tokens=4),
    ]
    state = build(params, 100)
    run, stop, length = FinishCode.RUNNING, FinishCode.STOP, FinishCode.LENGTH
    end = PROMPT_LEN + 10
    cases = [  # slot, token, new length, live, verdict
        (0, 5, end - 1, True, run),
        (0, 5, end, True, length),
        (0, 7, end, True, stop),  # a stop id wins
        (0, 7, PROMPT_LEN + 1, True, stop),
        (0, EOS[0], PROMPT_LEN + 1, True, stop),
        (0, EOS[0], PROMPT_LEN + 1, False, run),
        (1, EOS[0], PROMPT_LEN + 1, True, run),
        (1, 7, PROMPT_LEN + 1, True, stop),
        (2, 7, PROMPT_LEN + 3, True, run),
        (2, 7, PROMPT_LEN + 4, True, stop),
        (2, -1, PROMPT_LEN + 5, True, run),  # -1 pads stop_ids
    ]
    slots, tokens, lengths, live, verdict = zip(*cases, strict=True)
    codes = stop_code(
        state, jnp.asarray(slots), jnp.asarray(tokens), jnp.asarray(lengths), jnp.asarray(live)
    )
    assert codes.tolist() == [int(v) for v in verdict]


def test_min_tokens_masks_stop_ids_until_enough_tokens_are_out():
    params = {"min_tokens": 3, "stop_token_ids": (7,), "temperature": 0.0}
    state = build([SamplingParams(**params), SamplingParams(**params, ignore_eos=True)] * 2, 640)
    logits = np.zeros((4, 640), np.float32)
    logits[:, [7, EOS[0], 30]] = [3.0, 2.0, 1.0]
    for produced, expected in ((0, 30), (2, 30), (3, 7), (4, 7)):
        positions = np.full(4, PROMPT_LEN + produced, np.int32)
        assert _draw(logits, state, positions).tokens.tolist() == [expected] * 4


def _draw(logits, state, positions=(9, 9, 9, 9)):
    return draw(
        jnp.asarray(logits),
        state,
        jnp.arange(4, dtype=jnp.int32),
        jnp.asarray(positions, jnp.int32),
        jnp.ones(4, bool),
        config=SamplerConfig(num_candidates=8, tile_rows=2),
    )


def _log_softmax(logits):
    x = logits.astype(np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@pytest.mark.parametrize("vocab", [11, 1000, 49152])
def test_prompt_logprobs(vocab):
    rng = np.random.default_rng(vocab)
    logits = np.float32(rng.normal(size=(8, vocab)) * rng.uniform(0.1, 8, (8, 1)))
    logits[7] = np.round(logits[7])  # ties
    targets = rng.integers(0, vocab, 8)
    found = jax.jit(prompt_logprobs)(jnp.asarray(logits), jnp.asarray(targets, jnp.int32))
    exact = _log_softmax(logits)
    rows = np.arange(8)
    np.testing.assert_allclose(found.token, exact[rows, targets], rtol=1e-6, atol=2e-6)
    rank = (logits >= logits[rows, targets][:, None]).sum(-1)
    np.testing.assert_array_equal(found.rank, rank)
    n = min(vocab, MAX_LOGPROBS)
    best = np.argsort(-logits, axis=-1, kind="stable")[:, :n]
    np.testing.assert_array_equal(found.top_ids[:, :n], best)
    np.testing.assert_allclose(
        found.top[:, :n], np.take_along_axis(exact, best, -1), rtol=1e-6, atol=2e-6
    )
    assert np.isneginf(found.top[:, n:]).all()


def test_logprobs_are_of_the_raw_logits_and_only_where_asked_for():
    rng = np.random.default_rng(5)
    logits = np.float32(rng.normal(size=(4, 640)) * 3)
    params = [
        SamplingParams(temperature=0.3, top_k=2, logprobs=5, logit_bias=((4, 50.0),)),
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.0, logprobs=0),
        SamplingParams(temperature=1.0),
    ]
    tokens, found = _draw(logits, build(params, 640))
    exact = _log_softmax(logits)
    assert tokens[0] == 4
    for i in (0, 2):
        np.testing.assert_allclose(found.token[i], exact[i, tokens[i]], rtol=1e-6, atol=2e-6)
        assert found.rank[i] == (logits[i] >= logits[i, tokens[i]]).sum()
        best = np.argsort(-logits[i], kind="stable")[:MAX_LOGPROBS]
        np.testing.assert_array_equal(found.top_ids[i], best)
    assert found.rank.tolist()[2] == 1
    for i in (1, 3):
        assert not any(np.asarray(part[i]).any() for part in found)
