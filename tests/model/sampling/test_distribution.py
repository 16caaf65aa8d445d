"""Chi-square tests of the sampler's draws against float64 probabilities."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jserve.core.request import SamplingParams
from jserve.model.sampling.sample import SamplerConfig, sample
from tests.model.sampling.sampling_reference import PROMPT_LEN, build, distribution

ROWS = 256
SMALL = 60
# Few candidates, so that a small vocabulary takes both paths.
FEW = SamplerConfig(num_candidates=8, tile_rows=64)


@cache
def _program(config: SamplerConfig, rounds: int, stride: int):
    """Draws [rounds, rows] of one row of logits, at positions that never repeat."""

    def draw(logits, state, first, live):
        rows = jnp.broadcast_to(logits, (live.shape[0], logits.shape[1]))
        slots = jnp.arange(live.shape[0], dtype=jnp.int32)

        def one(_, i):
            return None, sample(rows, state, slots, first + i * stride, live, config).tokens

        return jax.lax.scan(one, None, jnp.arange(rounds, dtype=jnp.int32))[1]

    return jax.jit(draw)


def _counts(logits, params, *, rows, rounds, config, prompt=(), output=()):
    vocab = logits.size
    # Half of the rows share a seed and differ in position, the others differ in seed and choice.
    state = build(
        [
            SamplingParams(**{**params, "seed": max(i - rows // 2, 0) * 77_777_777_777 - 5})
            for i in range(rows)
        ],
        vocab,
        choices=[i % 3 if i > rows // 2 else 0 for i in range(rows)],
        prompts=[prompt] * rows,
        outputs=[output] * rows,
    )
    first = PROMPT_LEN + len(output) + np.where(np.arange(rows) <= rows // 2, np.arange(rows), 0)
    tokens = _program(config, rounds, rows)(
        jnp.asarray(logits, jnp.float32)[None],
        state,
        jnp.asarray(first, jnp.int32),
        jnp.ones(rows, bool),
    )
    return np.bincount(np.asarray(tokens).ravel(), minlength=vocab)


def _check(counts: np.ndarray, p: np.ndarray) -> None:
    draws = counts.sum()
    assert counts[p == 0].sum() == 0
    order = np.argsort(-p, kind="stable")
    expected, seen = p[order] * draws, counts[order]
    big = int((expected >= 10).sum())
    expected = np.append(expected[:big], expected[big:].sum())
    seen = np.append(seen[:big], seen[big:].sum())
    if expected[-1] < 10:  # too rare to test alone
        expected = np.append(expected[:-2], expected[-2:].sum())
        seen = np.append(seen[:-2], seen[-2:].sum())
    if len(expected) == 1:
        return
    chi2 = ((seen - expected) ** 2 / expected).sum()
    assert stats.chi2.sf(chi2, len(expected) - 1) > 1e-3, (chi2, len(expected) - 1)


SETTINGS = {
    "plain": {},
    "cold": {"temperature": 0.5},
    "hot": {"temperature": 2.5},
    "top_k within the candidates": {"top_k": 5},
    "top_k beyond the candidates": {"top_k": 20},
    "top_k 1": {"top_k": 1},
    "top_p within the candidates": {"top_p": 0.4},
    "top_p beyond the candidates": {"top_p": 0.9},
    "min_p within the candidates": {"min_p": 0.4},
    "min_p beyond the candidates": {"min_p": 0.05},
    "all truncations": {"temperature": 1.3, "top_k": 30, "top_p": 0.8, "min_p": 0.02},
    "top_k and top_p": {"temperature": 0.7, "top_k": 6, "top_p": 0.8},
    "penalties": {
        "repetition_penalty": 1.4,
        "presence_penalty": 0.6,
        "frequency_penalty": 0.4,
    },
    "bonuses": {
        "repetition_penalty": 0.8,
        "presence_penalty": -0.6,
        "frequency_penalty": -0.2,
        "top_p": 0.85,
    },
    "bias": {"logit_bias": ((0, 2.0), (7, -100.0), (59, 3.5)), "temperature": 0.9},
    "allowed": {"allowed_token_ids": (1, 4, 9, 31, 32, 33, 59)},
    "bad": {"bad_token_ids": (0, 3, 31, 32, 58), "top_k": 12},
    "min_tokens": {"min_tokens": 100_000, "stop_token_ids": (4, 40), "max_tokens": 200_000},
    "everything": {
        "temperature": 1.2,
        "top_k": 25,
        "top_p": 0.9,
        "min_p": 0.01,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "logit_bias": ((5, 1.0),),
        "allowed_token_ids": tuple(range(3, 55)),
        "bad_token_ids": (10, 11),
        "min_tokens": 100_000,
        "max_tokens": 200_000,
        "stop_token_ids": (20,),
    },
}


@pytest.mark.parametrize("name", SETTINGS)
def test_small_vocabulary(name):
    rng = np.random.default_rng(len(name))
    logits = np.float32(rng.normal(size=SMALL) * 1.5)
    prompt = (1, 5, 5, 30)
    output = (5, 7, 7, 7, 40)
    params = SETTINGS[name]
    counts = _counts(logits, params, rows=ROWS, rounds=80, config=FEW, prompt=prompt, output=output)
    _check(counts, distribution(logits, SamplingParams(**params), prompt, output))


def _peaked(vocab: int) -> np.ndarray:
    """Logits like a language model's: a few likely tokens, and a tail with a tenth of the mass."""
    rng = np.random.default_rng(3)
    logits = rng.normal(size=vocab)
    at = rng.choice(vocab, 40, replace=False)
    logits[at] += np.linspace(7, 12, 40) - np.log(49152 / vocab)
    return np.float32(logits)


# Draws take longer than compilation.
@pytest.mark.optimized
@pytest.mark.sweep
@pytest.mark.parametrize(
    ("vocab", "params"),
    [
        (49152, {"top_k": 50, "top_p": 0.9}),
        (49152, {"top_p": 0.85}),  # within the candidates
        (8192, {"temperature": 0.8}),
        (8192, {"top_p": 0.97}),  # beyond the candidates
    ],
    ids=str,
)
def test_large_vocabulary(vocab, params):
    logits = _peaked(vocab)
    counts = _counts(logits, params, rows=64, rounds=320, config=SamplerConfig())
    _check(counts, distribution(logits, SamplingParams(**params)))


@pytest.mark.optimized
def test_many_tokens_that_are_each_too_rare_for_float32_uniforms():
    # A tail of 2**13 tokens of 1e-7 each: with 23-bit uniforms they would almost never win.
    vocab = 1 << 13
    logits = np.full(vocab, np.log(1e-3 / vocab), np.float32)
    logits[123] = 0.0
    counts = _counts(logits, {}, rows=64, rounds=320, config=SamplerConfig())
    tail = counts.sum() - counts[123]
    expected = 1 - distribution(logits, SamplingParams())[123]
    assert stats.binomtest(int(tail), int(counts.sum()), expected).pvalue > 1e-3


def test_draws_of_neighbouring_positions_are_independent():
    params = SamplingParams(seed=11, allowed_token_ids=(0, 1, 2, 3))
    state = build([params] * ROWS, SMALL)
    tokens = _program(FEW, 80, ROWS)(
        jnp.zeros((1, SMALL)),
        state,
        jnp.arange(ROWS, dtype=jnp.int32),
        jnp.ones(ROWS, bool),
    )
    tokens = np.asarray(tokens).ravel()  # in order of position
    pairs = np.bincount(tokens[:-1] * 4 + tokens[1:], minlength=16)
    assert stats.chisquare(pairs).pvalue > 1e-3
