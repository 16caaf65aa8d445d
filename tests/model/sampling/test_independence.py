"""A row's result depends on nothing but itself, and not on how it is computed."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jserve.core.request import SamplingParams
from jserve.model.sampling import noise, sharded_vocab, truncation
from jserve.model.sampling.sample import SamplerConfig
from jserve.model.sampling.truncation import Truncation
from tests.model.sampling.sampling_reference import (
    KINDS,
    build,
    distribution,
    draw,
    processed,
    requests_of_every_kind,
    truncated,
)

pytestmark = pytest.mark.optimized

FEW = SamplerConfig(num_candidates=8, tile_rows=2)


def _run(vocab, order, num_rows, config, *, seed=0):
    """Samples the requests `order` in random slots and rows; the other rows hold other requests."""
    params, logits, prompts, outputs, positions = requests_of_every_kind(vocab)
    rng = np.random.default_rng(seed)
    n, num_slots = len(params), 64
    slots = rng.permutation(num_slots)[:n]
    state = build(
        params,
        vocab,
        prompts=prompts,
        outputs=outputs,
        slots=slots,
        num_slots=num_slots,
        choices=list(range(n)),
    )
    at = rng.permutation(num_rows)[: len(order)]
    who = rng.integers(0, n, num_rows)
    who[at] = order
    live = rng.random(num_rows) < 0.7
    live[at] = True
    sampled = draw(
        jnp.asarray(logits[who]),
        state,
        jnp.asarray(slots[who], jnp.int32),
        jnp.asarray(positions[who]),
        jnp.asarray(live),
        config=config,
    )
    return jax.tree.map(lambda x: np.asarray(x)[at], sampled)


# 1000 is no multiple of the block size, 1024 is.
@pytest.mark.parametrize(
    ("config", "vocab", "sizes"),
    [
        (FEW, 1000, (2, 64)),
        (SamplerConfig(), 1024, (64,)),
        pytest.param(SamplerConfig(), 1024, (3, 64), marks=pytest.mark.sweep),
        pytest.param(FEW, 1024, (2, 3, 256), marks=pytest.mark.sweep),
    ],
    ids=str,
)
def test_bitwise_independent_of_batch_slot_and_row(config, vocab, sizes):
    n = len(KINDS)
    whole = _run(vocab, np.arange(n), sizes[-1], config)
    for num_rows in sizes:
        for i in range(0, n, num_rows):
            order = np.arange(i, min(i + num_rows, n))
            part = _run(vocab, order, num_rows, config, seed=i + num_rows)
            expected = jax.tree.map(lambda x, order=order: x[order], whole)
            jax.tree.map(np.testing.assert_array_equal, part, expected)


def test_candidates_and_whole_vocabulary_choose_the_same_tokens():
    order = np.arange(len(KINDS))
    few = _run(1000, order, 64, FEW)
    many = _run(1000, order, 64, SamplerConfig(num_candidates=1000, tile_rows=8))
    jax.tree.map(np.testing.assert_array_equal, few, many)


def test_only_tokens_of_the_exact_support_are_drawn_and_greedy_takes_the_best():
    params, logits, prompts, outputs, _ = requests_of_every_kind(1000)
    tokens = _run(1000, np.arange(len(KINDS)), 64, FEW).tokens
    for i, p in enumerate(params):
        chances = distribution(logits[i], p, prompts[i], outputs[i])
        assert chances[tokens[i]] > 0
        if p.temperature == 0:
            assert tokens[i] == np.argmax(processed(logits[i], p, prompts[i], outputs[i]))


def _tokens(logits, params):
    """Samples from each row in the slot of its index.

    Vocabulary, rows and slots are those of other tests, whose program is compiled anyway.
    """
    rows = np.zeros((64, 1000), np.float32)
    rows[: len(logits)] = logits
    sampled = draw(
        jnp.asarray(rows),
        build(params, 1000, num_slots=64),
        jnp.arange(64, dtype=jnp.int32),
        jnp.full(64, 9, jnp.int32),
        jnp.arange(64) < len(logits),
        config=FEW,
    )
    return sampled.tokens[: len(logits)].tolist()


def test_greedy_ties_take_the_lowest_id_also_between_zeros_of_both_signs():
    logits = np.full((4, 1000), -1.0, np.float32)
    logits[0, [960, 70, 130]] = 5.0
    logits[1, [999, 64]] = [0.0, -0.0]
    logits[2, [3, 999]] = [-0.0, 0.0]
    logits[3, :] = 1.0
    # The third request is random, so that the general case runs as well.
    for third in ({"temperature": 0.0}, {"top_k": 3}):
        kinds = [{"temperature": 0.0}, {"temperature": 0.0}, {"temperature": 0.0}, third]
        assert _tokens(logits, [SamplingParams(**k) for k in kinds])[:3] == [70, 64, 3]


def test_masks_that_leave_nothing_choose_token_zero():
    params = [
        SamplingParams(allowed_token_ids=(5,), logit_bias=((5, -float("inf")),), temperature=t)
        for t in (0.0, 1.0)
    ] * 2
    assert _tokens(np.ones((4, 1000)), params) == [0, 0, 0, 0]


def _keep(x, k, p, min_p, temperature, num_candidates):
    """The kept set by candidates (None if undecided) and by bisection."""
    vocab = x.shape[1]
    n = x.shape[0]
    params = Truncation(
        jnp.full(n, temperature, jnp.float32),
        jnp.full(n, k if 0 < k < vocab else vocab, jnp.int32),
        jnp.full(n, p, jnp.float32),
        jnp.full(n, min_p, jnp.float32),
    )
    return _both(vocab, num_candidates)(x, params)


@cache
def _both(vocab, num_candidates):
    def both(x, params):
        values, ids = sharded_vocab.top_k(x, num_candidates)
        best = truncation.candidates(values, params, vocab)
        own, whole = truncation.total_from_weights(best.weight), truncation.vocab_total(x, params)
        known = best.closed | (params.top_k >= vocab)
        total = truncation.Total(
            jnp.where(best.closed, own.shift, whole.shift),
            jnp.where(best.closed, own.units, jnp.where(known, whole.units, 0)),
        )
        keep, decided = truncation.from_candidates(best, params, total)
        at = jnp.arange(x.shape[0])[:, None]
        spread = jnp.zeros(x.shape, bool).at[at, ids].set(keep)
        return spread, decided, truncation.from_vocab(x, params)[0]

    return jax.jit(both)


# Values from a small set make ties at every border; the others have none.
_VALUES = st.one_of(
    st.sampled_from([-2.0, -1.0, -0.0, 0.0, 0.5, 1.0]),
    st.floats(-8, 8, width=32, allow_subnormal=False),  # XLA takes subnormals for zero
    st.just(-float("inf")),
)


@settings(max_examples=300, deadline=None)
@given(
    row=st.lists(_VALUES, min_size=40, max_size=40),
    k=st.integers(0, 45),
    p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.1, 1e-6]),
    min_p=st.sampled_from([0.0, 0.0, 0.02, 0.3, 1.0]),
    temperature=st.sampled_from([1.0, 0.3, 2.0]),
)
def test_truncation_is_that_of_a_sort(row, k, p, min_p, temperature):
    x = np.asarray([row], np.float32)
    if np.isneginf(x).all():
        return
    spread, decided, whole = map(np.asarray, _keep(x, k, p, min_p, temperature, 8))
    if decided[0]:
        np.testing.assert_array_equal(spread, whole)
    exact = x[0].astype(np.float64)
    # Float32 parameters and weights decide like float64 but at an exact border.
    near = [
        truncated(exact, temperature, k, np.float32(p) * (1 + e), np.float32(min_p) * (1 + f))
        for e in (-1e-5, 0, 1e-5)
        for f in (-1e-5, 0, 1e-5)
    ]
    assert any(np.array_equal(whole[0], n) for n in near), (whole[0], near[4])


def test_truncation_of_a_large_vocabulary():
    rng = np.random.default_rng(1)
    x = np.float32(rng.normal(size=(4, 32000)) * 2)
    x[3] = np.round(x[3])  # few values, so many ties
    for k, p, min_p in ((1000, 1.0, 0.0), (0, 0.9, 0.0), (5000, 0.8, 0.001), (30, 0.9, 0.0)):
        spread, decided, whole = map(np.asarray, _keep(x, k, p, min_p, 1.0, 128))
        for i in range(len(x)):
            want = truncated(x[i].astype(np.float64), 1.0, k, np.float32(p), np.float32(min_p))
            # The mass at the border is known to 1e-7, which may be a token or two of so many.
            assert (want != whole[i]).sum() <= 2
            if decided[i]:
                np.testing.assert_array_equal(spread[i], whole[i])


def test_equal_logits_at_the_border():
    x = np.zeros((1, 200), np.float32)
    *_, top_p = _keep(x, 0, 0.5, 0.0, 1.0, 8)
    assert np.flatnonzero(top_p[0]).tolist() == list(range(100))  # the lower ids
    *_, top_k = _keep(x, 3, 1.0, 0.0, 1.0, 8)
    assert np.asarray(top_k).all()  # all that equal the third


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 123456789012345])
def test_keys_are_jax_keys_and_noise_its_64_bits(seed):
    words = jnp.asarray([[seed % 2**64 >> 32, seed % 2**32]] * 2, jnp.uint32)
    keys = noise.token_keys(words, jnp.asarray([0, 5]), jnp.asarray([0, 7000]))
    with jax.enable_x64(True):
        key = jax.random.key(seed, impl="threefry2x32")
        for i, (choice, position) in enumerate([(0, 0), (5, 7000)]):
            expected = jax.random.fold_in(jax.random.fold_in(key, choice), position)
            np.testing.assert_array_equal(jax.random.key_data(expected), keys[i])
            bits = np.asarray(jax.random.bits(expected, (3000,), np.uint64))
            uniform = (bits.astype(np.float64) + 0.5) / 2.0**64
            exponential = -np.log1p(-uniform)
            mine = np.asarray(noise.vocab_gumbel(keys, 3000))[i]
            # Float32 knows uniforms near 1, which make the least noise, only to 2**-24.
            coarse = 2.0**-24 / (exponential * (1 - uniform)) * (uniform > 2.0**-4)
            error = np.abs(mine + np.log(exponential))
            assert (error <= coarse + 2e-6 + 2e-6 * np.abs(mine)).all()


def test_noise_of_some_ids_is_that_of_the_whole_vocabulary():
    keys = jnp.asarray(np.random.default_rng(0).integers(0, 2**32, (3, 2)), jnp.uint32)
    ids = np.random.default_rng(1).integers(0, 50257, (3, 128))
    whole = np.asarray(jax.jit(noise.vocab_gumbel, static_argnums=1)(keys, 50257))
    some = np.asarray(jax.jit(noise.gumbel)(keys, jnp.asarray(ids, jnp.uint32)))
    np.testing.assert_array_equal(some, np.take_along_axis(whole, ids, axis=1))


@pytest.mark.parametrize("vocab", [1000, 4096])
def test_blocked_argmax_and_top_k(vocab):
    rng = np.random.default_rng(0)
    x = np.float32(rng.integers(-20, 20, (5, vocab)))  # ties everywhere
    x[0] = -np.inf
    order = np.argsort(-x, axis=-1, kind="stable")
    values, ids = sharded_vocab.top_k(jnp.asarray(x), 40)
    np.testing.assert_array_equal(ids, order[:, :40])
    np.testing.assert_array_equal(values, np.take_along_axis(x, order[:, :40], axis=1))
    np.testing.assert_array_equal(sharded_vocab.argmax(jnp.asarray(x)), order[:, 0])
