"""Logit processors: changes to a row's logits before temperature and truncation.

Order, as in vLLM V1 (`Sampler.apply_logits_processors` and `apply_penalties`):

1. allowed tokens and 2. bad tokens: -inf outside of the slot's mask, and of its step's
3. min_tokens: -inf for stop ids and end-of-sequence ids while the output is too short
4. logit bias: added
5. repetition penalty over prompt and output: positive logits divided, others multiplied
6. frequency penalty × count in the output, then presence penalty if in the output: subtracted
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32

from jserve.model.sampling.sharded_vocab import Axes, first_id, local_index
from jserve.model.sampling.state import Processor, SamplerState


def needed(
    state: SamplerState, slots: Int32[Array, " rows"], positions: Int32[Array, " rows"]
) -> Bool[Array, " rows"]:
    """Whether any processor changes the row at this position."""
    bits = state.processors[slots]
    early = positions < state.min_total[slots]
    return ((bits & ~Processor.MIN_TOKENS) != 0) | (((bits & Processor.MIN_TOKENS) != 0) & early)


def process(
    logits: Float32[Array, "rows vocab"],
    state: SamplerState,
    slots: Int32[Array, " rows"],
    positions: Int32[Array, " rows"],
    axes: Axes = (),
) -> Float32[Array, "rows vocab"]:
    """The processed logits of rows whose tokens are chosen at `positions`.

    `vocab` is this device's share of the vocabulary if it is split over `axes` (see
    `sharded_vocab`).
    """
    bits = state.processors[slots][:, None]
    masked = (bits & (Processor.MASK | Processor.STEP_MASK)) != 0
    x = jnp.where(masked & ~_allowed(state, slots, axes), -jnp.inf, logits)

    rows = jnp.arange(logits.shape[0])[:, None]
    early = ((bits & Processor.MIN_TOKENS) != 0) & (positions < state.min_total[slots])[:, None]
    stop_ids = state.stop_ids[slots]
    unused = logits.shape[1]  # past the row: dropped; a negative index would wrap
    stop_ids = jnp.where(early & (stop_ids >= 0), local_index(stop_ids, unused, axes), unused)
    x = x.at[rows, stop_ids].set(-jnp.inf, mode="drop")

    bias_ids = state.bias_ids[slots]
    biased = ((bits & Processor.BIAS) != 0) & (bias_ids >= 0)
    bias_ids = jnp.where(biased, local_index(bias_ids, unused, axes), unused)
    x = x.at[rows, bias_ids].add(state.bias[slots], mode="drop")
    return jnp.where((bits & Processor.PENALTIES) != 0, _penalize(x, state, slots), x)


def _allowed(
    state: SamplerState, slots: Int32[Array, " rows"], axes: Axes
) -> Bool[Array, "rows vocab"]:
    bits, everything = state.processors[slots][:, None], jnp.uint32(2**32 - 1)
    words = jnp.where((bits & Processor.MASK) != 0, state.mask[slots], everything)
    words &= jnp.where((bits & Processor.STEP_MASK) != 0, state.step_mask[slots], everything)
    first = jnp.int32(0)
    if axes:  # the words that the share touches; it may begin and end inside of one
        first = first_id(state.vocab, axes)
        touched = (state.vocab + 31) // 32 + 1
        words = jnp.pad(words, ((0, 0), (0, touched)))
        words = lax.dynamic_slice_in_dim(words, first >> 5, touched, axis=1)
    places = jnp.arange(32, dtype=jnp.uint32)[None, None, :]
    bits = ((words[:, :, None] >> places) & 1).reshape(words.shape[0], -1)
    if axes:
        return lax.dynamic_slice_in_dim(bits, first & 31, state.vocab, axis=1) != 0
    return bits[:, : state.vocab] != 0


def _penalize(
    x: Float32[Array, "rows vocab"], state: SamplerState, slots: Int32[Array, " rows"]
) -> Float32[Array, "rows vocab"]:
    counts = state.output_counts[slots]
    produced = counts > 0
    repetition = state.repetition_penalty[slots][:, None]
    repeated = jnp.where(x > 0, x / repetition, x * repetition)
    x = jnp.where(state.prompt_seen[slots] | produced, repeated, x)
    x = x - state.frequency_penalty[slots][:, None] * counts.astype(jnp.float32)
    return x - state.presence_penalty[slots][:, None] * produced.astype(jnp.float32)
