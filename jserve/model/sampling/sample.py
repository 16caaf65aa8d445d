"""Chooses the next token of every row, inside the step program.

Semantics are vLLM V1's (`vllm/v1/sample/sampler.py`): log-probabilities are taken of the raw
logits; then the processors (see `processors`); then, at a temperature below 1e-5, the best token,
lowest id among equals; else division by temperature, min_p, top_k, top_p (see `truncation`) and a
draw. The draw is the maximum of scaled logit + Gumbel noise over what is left, which is a sample
of their softmax; the noise depends on seed, choice, position and token id only (see `noise`).
If the masks leave no token, the answer is token 0.

How it is fast without a sort: a plain greedy batch is one argmax. Otherwise the best
`num_candidates` tokens of each row usually decide it; a row that they do not decide (no
truncation, a wide nucleus, a large top_k) is computed over the whole vocabulary, in tiles of such
rows. Every row's result is a function of its own logits and parameters: which other rows there
are decides only what is computed besides, and all sums are of integers (see `mass`).
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jserve.model.sampling import noise, processors, truncation
from jserve.model.sampling import rows as tiles
from jserve.model.sampling.logprobs import Logprobs, no_logprobs, raw_logprobs
from jserve.model.sampling.mass import MAX_VOCAB
from jserve.model.sampling.state import GREEDY_BELOW, SamplerState
from jserve.model.sampling.truncation import Total, Truncation

_LOGPROB_TILE = 8  # rows; see raw_logprobs


@dataclass(frozen=True)
class SamplerConfig:
    """Trades time only; results do not depend on it."""

    num_candidates: int = 128  # tokens a row is first tried with
    tile_rows: int = 8  # rows of a pass over the vocabulary; on an accelerator all rows


class Sampled(NamedTuple):
    """The chosen tokens [rows], and their log-probabilities where the slot asks for them."""

    tokens: jax.Array  # int32 [rows]; meaningless where the row is not live
    logprobs: Logprobs  # zeros where not asked for


def sample(
    logits: jax.Array,
    state: SamplerState,
    slots: jax.Array,
    positions: jax.Array,
    live: jax.Array,
    config: SamplerConfig = SamplerConfig(),
) -> Sampled:
    """Chooses a token for each row.

    Args:
      logits: float32 [rows, vocab], raw.
      state: the sampling state of all slots.
      slots: int32 [rows], the slot of each row.
      positions: int32 [rows], absolute position of the token to choose: the length so far.
      live: bool [rows]; the others cost nothing and mean nothing.
      config: how to compute it.

    Raises:
      ValueError: the vocabulary is larger than 2**18.
    """
    if logits.shape[1] > MAX_VOCAB:
        raise ValueError(f"vocab is {logits.shape[1]}; the sampler's sums hold {MAX_VOCAB}")
    slots = jnp.clip(slots, 0, state.num_slots - 1)
    random = live & (state.temperature[slots] >= GREEDY_BELOW)
    processed = live & processors.needed(state, slots, positions)
    tokens = lax.cond(
        tiles.count(random | processed) > 0,
        lambda: _choose(logits, state, slots, positions, random, processed, config),
        lambda: tiles.argmax(logits),
    )
    wanted = live & (state.num_logprobs[slots] >= 0)

    def add_logprobs(rows: jax.Array, carry: Logprobs) -> Logprobs:
        found = raw_logprobs(tiles.take(logits, rows), tiles.take(tokens, rows))
        return Logprobs(*(tiles.put(x, rows, v) for x, v in zip(carry, found, strict=True)))

    none = no_logprobs(logits.shape[0])
    return Sampled(tokens, tiles.for_each_tile(wanted, _LOGPROB_TILE, add_logprobs, none))


def _choose(
    logits: jax.Array,
    state: SamplerState,
    slots: jax.Array,
    positions: jax.Array,
    random: jax.Array,
    processed: jax.Array,
    config: SamplerConfig,
) -> jax.Array:
    """The general case: tokens int32 [rows] when some row is random or has processors."""
    tile = min(config.tile_rows, logits.shape[0])

    def process(rows: jax.Array, x: jax.Array) -> jax.Array:
        at = tiles.take(slots, rows)
        done = processors.process(tiles.take(logits, rows), state, at, tiles.take(positions, rows))
        return tiles.put(x, rows, done)

    x = tiles.for_each_tile(processed, tile, process, logits)
    best = tiles.argmax(x)
    return lax.cond(
        tiles.count(random) > 0,
        lambda: jnp.where(random, _draw(x, state, slots, positions, random, config), best),
        lambda: best,
    )


def _draw(
    x: jax.Array,
    state: SamplerState,
    slots: jax.Array,
    positions: jax.Array,
    random: jax.Array,
    config: SamplerConfig,
) -> jax.Array:
    """Draws a token for the rows where `random`, from processed logits `x` [rows, vocab]."""
    vocab = x.shape[1]
    tile = min(config.tile_rows, x.shape[0])
    params = _truncation_of(state, slots, random, vocab)
    keys = noise.token_keys(state.seed[slots], state.choice[slots], positions)

    values, ids = tiles.top_k(x, min(config.num_candidates, vocab))
    best = truncation.candidates(values, params, vocab)
    own = truncation.total_of(best.weight)

    def add_total(rows: jax.Array, carry: Total) -> Total:
        found = truncation.vocab_total(tiles.take(x, rows), _take(params, rows))
        return Total(*(tiles.put(c, rows, v) for c, v in zip(carry, found, strict=True)))

    whole = random & ~best.closed & (params.top_p < 1.0) & (params.top_k >= vocab)
    total = Total(own.shift, jnp.where(best.closed, own.units, 0))
    total = tiles.for_each_tile(whole, tile, add_total, total)
    keep, decided = truncation.from_candidates(best, params, total)
    noisy = best.scaled + noise.gumbel(keys, ids.astype(jnp.uint32))
    tokens = _pick(jnp.where(keep, noisy, -jnp.inf), ids, vocab)

    def draw_whole(rows: jax.Array, carry: jax.Array) -> jax.Array:
        keep, scaled = truncation.from_vocab(tiles.take(x, rows), _take(params, rows))
        noisy = scaled + noise.vocab_gumbel(tiles.take(keys, rows), vocab)
        return tiles.put(carry, rows, tiles.argmax(jnp.where(keep, noisy, -jnp.inf)))

    return tiles.for_each_tile(random & ~decided, tile, draw_whole, tokens)


def _truncation_of(
    state: SamplerState, slots: jax.Array, random: jax.Array, vocab: int
) -> Truncation:
    top_k = state.top_k[slots]
    return Truncation(
        temperature=jnp.where(random, state.temperature[slots], 1.0),
        top_k=jnp.where((top_k <= 0) | (top_k > vocab), vocab, top_k),
        top_p=state.top_p[slots],
        min_p=state.min_p[slots],
    )


def _take(params: Truncation, rows: jax.Array) -> Truncation:
    return Truncation(*(tiles.take(p, rows) for p in params))


def _pick(noisy: jax.Array, ids: jax.Array, vocab: int) -> jax.Array:
    """The id of the candidate with the largest noisy logit, the lowest among equals: [rows]."""
    best = jnp.max(noisy, axis=-1, keepdims=True)
    return jnp.min(jnp.where(noisy == best, ids, vocab - 1), axis=-1)
