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
are decides only which work is skipped, and all sums are of integers (see `mass`).

All of it also runs on rows that are split over devices; see `sharded_vocab`.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32, UInt32

from jserve.model.sampling import noise, processors, truncation
from jserve.model.sampling.logprobs import Logprobs, no_logprobs, raw_logprobs
from jserve.model.sampling.mass import MAX_VOCAB
from jserve.model.sampling.sharded_vocab import Axes, argmax, count, top_k, width
from jserve.model.sampling.state import GREEDY_BELOW, SamplerState
from jserve.model.sampling.tiling import for_each_tile, gather_rows, scatter_rows
from jserve.model.sampling.truncation import Total, Truncation
from jserve.pallas_kernels.backend import Backend

_TILE = 8  # rows of the smaller passes; raw_logprobs needs as many


@dataclass(frozen=True)
class SamplerConfig:
    """Sizes that trade time; results do not depend on them."""

    num_candidates: int = 128  # tokens a row is first tried with
    tile_rows: int = 2  # rows of a pass over the vocabulary, as many as fit a core's cache


def sampler_config(backend: Backend, rows: int) -> SamplerConfig:
    """The config for a backend and a batch: only a CPU runs passes over the vocabulary in tiles.

    An accelerator's memory is as fast for all rows at once, and devices exchange less often.
    """
    on_cpu = backend in (Backend.REFERENCE, Backend.CPU, Backend.NATIVE)
    return SamplerConfig() if on_cpu else SamplerConfig(tile_rows=rows)


class Sampled(NamedTuple):
    """The chosen tokens, and their log-probabilities where the slot asks for them."""

    tokens: Int32[Array, " rows"]  # meaningless where the row is not live
    logprobs: Logprobs  # zeros where not asked for


def sample(
    logits: Float32[Array, "rows vocab"],
    state: SamplerState,
    slots: Int32[Array, " rows"],
    positions: Int32[Array, " rows"],
    live: Bool[Array, " rows"],
    config: SamplerConfig = SamplerConfig(),
    axes: Axes = (),
) -> Sampled:
    """Chooses a token for each row.

    Args:
      logits: raw; or this device's share of the vocabulary.
      state: the sampling state of all slots; counts of token ids are of the same share.
      slots: the slot of each row.
      positions: absolute position of the token to choose: the length so far.
      live: false for rows whose result is not read; they cost nothing.
      config: trades time only.
      axes: mesh axes that the vocabulary is split over, inside of a `shard_map`.

    Raises:
      ValueError: the vocabulary is larger than 2**18.
    """
    vocab = width(logits, axes)
    if vocab > MAX_VOCAB:
        raise ValueError(f"vocab is {vocab}; the sampler's sums hold {MAX_VOCAB}")
    slots = jnp.clip(slots, 0, state.num_slots - 1)
    random = live & (state.temperature[slots] >= GREEDY_BELOW)
    processed = live & processors.needed(state, slots, positions)
    tokens = lax.cond(
        count(random | processed) > 0,
        lambda: _choose(logits, state, slots, positions, random, processed, config, axes),
        lambda: argmax(logits, axes),
    )
    wanted = live & (state.num_logprobs[slots] >= 0)

    def add_logprobs(rows: jax.Array, carry: Logprobs) -> Logprobs:
        found = raw_logprobs(gather_rows(logits, rows), gather_rows(tokens, rows), axes)
        return Logprobs(*(scatter_rows(x, rows, v) for x, v in zip(carry, found, strict=True)))

    none = no_logprobs(logits.shape[0])
    return Sampled(tokens, for_each_tile(wanted, _TILE, add_logprobs, none))


def _choose(
    logits: Float32[Array, "rows vocab"],
    state: SamplerState,
    slots: Int32[Array, " rows"],
    positions: Int32[Array, " rows"],
    random: Bool[Array, " rows"],
    processed: Bool[Array, " rows"],
    config: SamplerConfig,
    axes: Axes,
) -> Int32[Array, " rows"]:
    """The tokens in the general case: some row is random or has processors."""
    tile = min(config.tile_rows, logits.shape[0])

    def process(rows: jax.Array, x: jax.Array) -> jax.Array:
        at, raw = gather_rows(slots, rows), gather_rows(logits, rows)
        done = processors.process(raw, state, at, gather_rows(positions, rows), axes)
        return scatter_rows(x, rows, done)

    x = for_each_tile(processed, tile, process, logits)
    best = argmax(x, axes)
    return lax.cond(
        count(random) > 0,
        lambda: jnp.where(random, _draw(x, state, slots, positions, random, config, axes), best),
        lambda: best,
    )


def _draw(
    x: Float32[Array, "rows vocab"],
    state: SamplerState,
    slots: Int32[Array, " rows"],
    positions: Int32[Array, " rows"],
    random: Bool[Array, " rows"],
    config: SamplerConfig,
    axes: Axes,
) -> Int32[Array, " rows"]:
    """Draws a token for the rows where `random`, from processed logits."""
    num_rows, vocab = x.shape[0], width(x, axes)
    params = _truncation_params(state, slots, random, vocab)
    keys = noise.token_keys(state.seed[slots], state.choice[slots], positions)

    def draw_candidates(
        rows: jax.Array, carry: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array]:
        found = _draw_from_candidates(
            gather_rows(x, rows),
            _gather_params(params, rows),
            gather_rows(keys, rows),
            min(config.num_candidates, vocab),
            axes,
        )
        return scatter_rows(carry[0], rows, found[0]), scatter_rows(carry[1], rows, found[1])

    nothing = (jnp.zeros((num_rows,), jnp.int32), jnp.zeros((num_rows,), bool))
    tokens, decided = for_each_tile(
        random & params.truncates(vocab),
        min(max(config.tile_rows, _TILE), num_rows),
        draw_candidates,
        nothing,
    )

    def draw_whole(rows: jax.Array, carry: jax.Array) -> jax.Array:
        keep, scaled = truncation.from_vocab(
            gather_rows(x, rows), _gather_params(params, rows), axes
        )
        noisy = scaled + noise.vocab_gumbel(gather_rows(keys, rows), x.shape[1], axes)
        return scatter_rows(carry, rows, argmax(jnp.where(keep, noisy, -jnp.inf), axes))

    tile = min(config.tile_rows, num_rows)
    return for_each_tile(random & ~decided, tile, draw_whole, tokens)


def _draw_from_candidates(
    x: Float32[Array, "rows vocab"],
    params: Truncation,
    keys: UInt32[Array, "rows 2"],
    num_candidates: int,
    axes: Axes,
) -> tuple[Int32[Array, " rows"], Bool[Array, " rows"]]:
    """Draws tokens of truncated rows, and tells for which of them the candidates suffice."""
    vocab = width(x, axes)
    values, ids = top_k(x, num_candidates, axes)
    best = truncation.candidates(values, params, vocab)
    known = truncation.total_from_weights(best.weight)
    # A nucleus of more than the candidates needs the mass of the whole vocabulary.
    whole = ~best.closed & (params.top_p < 1.0) & (params.top_k >= vocab)
    unknown = Total(known.shift, jnp.zeros_like(known.units))
    other = lax.cond(
        count(whole) > 0, lambda: truncation.vocab_total(x, params, axes), lambda: unknown
    )
    total = Total(
        jnp.where(whole, other.shift, known.shift),
        jnp.where(whole, other.units, jnp.where(best.closed, known.units, 0)),
    )
    keep, decided = truncation.from_candidates(best, params, total)
    noisy = jnp.where(keep, best.scaled + noise.gumbel(keys, ids.astype(jnp.uint32)), -jnp.inf)
    largest = jnp.max(noisy, axis=-1, keepdims=True)
    # Equal values: the lowest id, as argmax over the vocabulary takes it.
    return jnp.min(jnp.where(noisy == largest, ids, vocab - 1), axis=-1), decided


def _truncation_params(
    state: SamplerState, slots: Int32[Array, " rows"], random: Bool[Array, " rows"], vocab: int
) -> Truncation:
    top_k = state.top_k[slots]
    return Truncation(
        temperature=jnp.where(random, state.temperature[slots], 1.0),
        top_k=jnp.where((top_k <= 0) | (top_k > vocab), vocab, top_k),
        top_p=state.top_p[slots],
        min_p=state.min_p[slots],
    )


def _gather_params(params: Truncation, rows: jax.Array) -> Truncation:
    return Truncation(*(gather_rows(p, rows) for p in params))
