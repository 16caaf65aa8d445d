"""Sampling state of every slot on the device, and its updates by the step program."""

import enum
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32, UInt32

from jserve.core.request import MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS
from jserve.core.step import FinishCode
from jserve.model.sampling.sharded_vocab import Axes, local_index

GREEDY_BELOW = 1e-5  # temperatures below are greedy, as in vLLM


class Processor(enum.IntFlag):
    """The logit processors that a slot needs; state of the others is stale and never read."""

    MASK = 1
    BIAS = 2
    MIN_TOKENS = 4
    PENALTIES = 8
    STEP_MASK = 16  # until the slot has sampled once


class SamplerState(NamedTuple):
    """The sampling of every slot, one entry each: the one declaration of its fields.

    The host's records (`SLOT_ROW`, `processor_row_dtype`) derive from these fields, and `host_row`
    fills them from the request's `SamplingParams` by name. Mask, biases and counts are read only
    for slots whose `processors` say so.

    Over several devices each holds its share of the vocabulary of `prompt_seen` and
    `output_counts`, and all of the rest (see `sharded`).
    """

    temperature: Float32[Array, " slots"]  # below GREEDY_BELOW is greedy
    top_p: Float32[Array, " slots"]  # 1 keeps all
    min_p: Float32[Array, " slots"]  # 0 keeps all
    repetition_penalty: Float32[Array, " slots"]  # 1 is neutral
    presence_penalty: Float32[Array, " slots"]  # 0 is neutral
    frequency_penalty: Float32[Array, " slots"]  # 0 is neutral
    top_k: Int32[Array, " slots"]  # 0 or less keeps all
    seed: UInt32[Array, "slots 2"]  # high and low word
    choice: Int32[Array, " slots"]
    num_logprobs: Int32[Array, " slots"]  # -1 for none
    processors: Int32[Array, " slots"]  # Processor bits
    num_stop_ids: Int32[Array, " slots"]  # the first num_stop_ids of stop_ids end the sequence
    min_total: Int32[Array, " slots"]  # prompt length + min_tokens
    max_total: Int32[Array, " slots"]  # prompt length + max_tokens
    # -1 where unused. All are masked below min_total: also the ids past num_stop_ids, which are
    # an ignored end-of-sequence's, as in vLLM.
    stop_ids: Int32[Array, "slots stop_ids"]
    bias_ids: Int32[Array, "slots biases"]  # -1 where unused
    bias: Float32[Array, "slots biases"]
    mask: UInt32[Array, "slots words"]  # bit i % 32 of word i // 32: id i is allowed
    step_mask: UInt32[Array, "slots words"]  # the same, of a step whose plan has a mask for it
    prompt_seen: Bool[Array, "slots vocab"]  # the id occurs in the prompt
    output_counts: Int32[Array, "slots vocab"]  # times the id was generated

    @property
    def num_slots(self) -> int:
        return self.temperature.shape[0]

    @property
    def vocab(self) -> int:
        """The number of token ids, or of a device's share of them inside of a `shard_map`."""
        return self.output_counts.shape[1]


_PROCESSOR_FIELDS = ("bias_ids", "bias", "mask")  # sent only for slots that need them
# Not sent with an admission: the device counts, and a step brings its masks.
_OTHER_FIELDS = ("prompt_seen", "output_counts", "step_mask")
_SLOT_FIELDS = tuple(
    name for name in SamplerState._fields if name not in _PROCESSOR_FIELDS + _OTHER_FIELDS
)


def _entry(name: str, vocab: int) -> tuple[str, tuple[int, ...]]:
    """The dtype and shape of a field's entry for one slot."""
    sizes = {
        "stop_ids": MAX_STOP_TOKEN_IDS,
        "biases": MAX_LOGIT_BIAS,
        "words": -(-vocab // 32),
        "vocab": vocab,
    }
    declared = SamplerState.__annotations__[name]
    dtype = declared.dtypes[0]
    _, *dims = declared.dim_str.split()
    return dtype, tuple(sizes[dim] if dim in sizes else int(dim) for dim in dims)


def _row_dtype(names: Sequence[str], vocab: int = 0) -> np.dtype:
    """A slot's entries of some fields on the host, 4 bytes a value: a row travels as int32."""
    return np.dtype([(name, *_entry(name, vocab)) for name in names])


SLOT_ROW = _row_dtype(_SLOT_FIELDS)
SLOT_ROW_WORDS = SLOT_ROW.itemsize // 4


def processor_row_dtype(vocab: int) -> np.dtype:
    """A slot's mask and biases on the host, as `SLOT_ROW` for the rest."""
    return _row_dtype(_PROCESSOR_FIELDS, vocab)


def init_sampler_state(num_slots: int, vocab: int) -> SamplerState:
    """The state before any admission: every slot greedy, without processors or stop ids."""
    entries = {name: _entry(name, vocab) for name in SamplerState._fields}
    return SamplerState(
        **{name: jnp.zeros((num_slots, *shape), dtype) for name, (dtype, shape) in entries.items()}
    )


def _write(
    state: SamplerState,
    dtype: np.dtype,
    slots: Int32[Array, " rows"],
    words: Int32[Array, "rows words"],
) -> SamplerState:
    changed: dict[str, jax.Array] = {}
    for name, (field, offset, *_) in (dtype.fields or {}).items():
        width = field.itemsize // 4
        columns = words[:, offset // 4 : offset // 4 + width]
        values = lax.bitcast_convert_type(columns, jnp.dtype(field.base))
        values = values.reshape(words.shape[0], *field.shape)
        changed[name] = getattr(state, name).at[slots].set(values, mode="drop")
    return state._replace(**changed)


def admit(
    state: SamplerState, slots: Int32[Array, " rows"], words: Int32[Array, "rows words"]
) -> SamplerState:
    """Writes the scalars of newly admitted slots.

    Args:
      state: the state of all slots.
      slots: entries ≥ num_slots are padding.
      words: SLOT_ROW records viewed as words.
    """
    return _write(state, SLOT_ROW, slots, words)


def admit_processors(
    state: SamplerState, slots: Int32[Array, " rows"], words: Int32[Array, "rows words"]
) -> SamplerState:
    """Writes mask and biases of slots that need them; `words` are `processor_row_dtype` records."""
    return _write(state, processor_row_dtype(state.vocab), slots, words)


def set_step_masks(
    state: SamplerState,
    num_masks: Int32[Array, ""],
    slots: Int32[Array, " masks"],
    words: Int32[Array, "masks words"],
) -> SamplerState:
    """Masks the next token of the first `num_masks` of `slots`.

    The cost follows their number; donated buffers are changed in place.
    """

    def write(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        masks, bits = carry
        slot = slots[i]
        row = lax.bitcast_convert_type(lax.dynamic_slice_in_dim(words, i, 1), jnp.uint32)
        masks = lax.dynamic_update_slice(masks, row, (slot, jnp.zeros_like(slot)))
        return masks, bits.at[slot].set(bits[slot] | Processor.STEP_MASK)

    masks, bits = lax.fori_loop(0, num_masks, write, (state.step_mask, state.processors))
    return state._replace(step_mask=masks, processors=bits)


def clear_step_masks(state: SamplerState) -> SamplerState:
    """Ends what `set_step_masks` began."""
    return state._replace(processors=state.processors & ~Processor.STEP_MASK)


def reset(state: SamplerState, keep: Bool[Array, " slots"]) -> SamplerState:
    """Forgets the tokens seen by newly admitted slots, which are those not in `keep`.

    The cost follows the number of such slots; donated buffers are changed in place.
    """
    (dropped,) = jnp.nonzero(~keep, size=state.num_slots, fill_value=0)

    def clear(i: jax.Array, seen: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        prompt_seen, output_counts = seen
        blank = (jnp.zeros((1, state.vocab), bool), jnp.zeros((1, state.vocab), jnp.int32))
        at = (dropped[i], jnp.zeros_like(dropped[i]))
        return (
            lax.dynamic_update_slice(prompt_seen, blank[0], at),
            lax.dynamic_update_slice(output_counts, blank[1], at),
        )

    num_dropped = jnp.sum(~keep, dtype=jnp.int32)
    prompt_seen, output_counts = lax.fori_loop(
        0, num_dropped, clear, (state.prompt_seen, state.output_counts)
    )
    return state._replace(prompt_seen=prompt_seen, output_counts=output_counts)


def observe(
    state: SamplerState,
    slots: Int32[Array, " rows"],
    tokens: Int32[Array, " rows"],
    live: Bool[Array, " rows"],
    axes: Axes = (),
) -> SamplerState:
    """Counts the newly sampled `tokens` of `slots` as output, where `live`."""
    at = jnp.where(live, slots, state.num_slots)
    tokens = local_index(tokens, state.vocab, axes)
    return state._replace(output_counts=state.output_counts.at[at, tokens].add(1, mode="drop"))


def count_chunk(
    state: SamplerState,
    token_slots: Int32[Array, " tokens"],
    tokens: Int32[Array, " tokens"],
    is_prompt: Bool[Array, " tokens"],
    live: Bool[Array, " tokens"],
    axes: Axes = (),
) -> SamplerState:
    """Marks prompt tokens of chunks as seen, and counts recomputed output tokens as generated.

    Decode tokens must not be live here: `observe` has counted them when they were sampled.

    Args:
      state: the state of all slots; slots must have been `reset` at admission.
      token_slots: the slot of each token.
      tokens: ids.
      is_prompt: whether the token's position is inside the prompt.
      live: false for padding and decode tokens.
      axes: see `sharded_vocab`.
    """
    tokens = local_index(tokens, state.vocab, axes)
    prompt_at = jnp.where(live & is_prompt, token_slots, state.num_slots)
    output_at = jnp.where(live & ~is_prompt, token_slots, state.num_slots)
    return state._replace(
        prompt_seen=state.prompt_seen.at[prompt_at, tokens].set(True, mode="drop"),
        output_counts=state.output_counts.at[output_at, tokens].add(1, mode="drop"),
    )


def stop_code(
    state: SamplerState,
    slots: Int32[Array, " rows"],
    tokens: Int32[Array, " rows"],
    new_lengths: Int32[Array, " rows"],
    live: Bool[Array, " rows"],
) -> Int32[Array, " rows"]:
    """The FinishCode of each row after its new token, as vLLM's `check_stop`.

    Args:
      state: the state of all slots.
      slots: the slot of each row.
      tokens: the new tokens.
      new_lengths: prompt and output tokens, the new one included.
      live: other rows are RUNNING.
    """
    ends = jnp.arange(MAX_STOP_TOKEN_IDS)[None, :] < state.num_stop_ids[slots][:, None]
    stop = jnp.any((state.stop_ids[slots] == tokens[:, None]) & ends, axis=-1)
    stop &= new_lengths >= state.min_total[slots]
    length = new_lengths >= state.max_total[slots]
    code = jnp.where(
        stop,
        int(FinishCode.STOP),
        jnp.where(length, int(FinishCode.LENGTH), int(FinishCode.RUNNING)),
    )
    return jnp.where(live, code, int(FinishCode.RUNNING)).astype(jnp.int32)
