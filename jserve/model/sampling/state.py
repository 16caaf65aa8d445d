"""Sampling state of every slot on the device, and the updates that the step program makes to it."""

import enum
from dataclasses import dataclass, fields, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jserve.core.request import MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS
from jserve.core.step import FinishCode
from jserve.model.sampling.rows import Axes, own

GREEDY_BELOW = 1e-5  # temperatures below are greedy, as in vLLM


class Processor(enum.IntFlag):
    """Which logit processors a slot needs; state of the others is stale and never read."""

    MASK = 1
    BIAS = 2
    MIN_TOKENS = 4
    PENALTIES = 8


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplerState:
    """One entry per slot. The scalars are small; `mask` and below are read only where needed.

    Over several devices each holds its share of the vocabulary of `prompt_seen` and
    `output_counts`, and all of the rest (see `sharded`).
    """

    temperature: jax.Array  # float32 [slots]; below GREEDY_BELOW is greedy
    top_p: jax.Array  # float32 [slots]; 1 keeps all
    min_p: jax.Array  # float32 [slots]; 0 keeps all
    repetition_penalty: jax.Array  # float32 [slots]; 1 is neutral
    presence_penalty: jax.Array  # float32 [slots]; 0 is neutral
    frequency_penalty: jax.Array  # float32 [slots]; 0 is neutral
    top_k: jax.Array  # int32 [slots]; 0 or less keeps all
    seed: jax.Array  # uint32 [slots, 2]; high and low word
    choice: jax.Array  # int32 [slots]
    num_logprobs: jax.Array  # int32 [slots]; -1 for none
    processors: jax.Array  # int32 [slots]; Processor bits
    num_stop_ids: jax.Array  # int32 [slots]; how many of stop_ids end the sequence
    min_total: jax.Array  # int32 [slots]; prompt length + min_tokens
    max_total: jax.Array  # int32 [slots]; prompt length + max_tokens
    # int32 [slots, MAX_STOP_TOKEN_IDS], -1 where unused. All are masked below min_total: also
    # the ids past num_stop_ids, an ignored end-of-sequence's, as in vLLM.
    stop_ids: jax.Array
    bias_ids: jax.Array  # int32 [slots, MAX_LOGIT_BIAS], -1 where unused
    bias: jax.Array  # float32 [slots, MAX_LOGIT_BIAS]
    mask: jax.Array  # uint32 [slots, ceil(vocab / 32)]; bit i % 32 of word i // 32: id i allowed
    prompt_seen: jax.Array  # bool [slots, vocab]; the id occurs in the prompt
    output_counts: jax.Array  # int32 [slots, vocab]; times the id was generated

    @property
    def num_slots(self) -> int:
        """The number of slots."""
        return self.temperature.shape[0]

    @property
    def vocab(self) -> int:
        """The number of token ids, or of a device's share of them inside of a `shard_map`."""
        return self.output_counts.shape[1]


# A slot's scalars on the host: 4-byte fields, so that rows travel as int32 words.
SLOT_ROW = np.dtype(
    [
        ("temperature", np.float32),
        ("top_p", np.float32),
        ("min_p", np.float32),
        ("repetition_penalty", np.float32),
        ("presence_penalty", np.float32),
        ("frequency_penalty", np.float32),
        ("top_k", np.int32),
        ("seed", np.uint32, (2,)),
        ("choice", np.int32),
        ("num_logprobs", np.int32),
        ("processors", np.int32),
        ("num_stop_ids", np.int32),
        ("min_total", np.int32),
        ("max_total", np.int32),
        ("stop_ids", np.int32, (MAX_STOP_TOKEN_IDS,)),
    ]
)
SLOT_ROW_WORDS = SLOT_ROW.itemsize // 4


def processor_row_dtype(vocab: int) -> np.dtype:
    """A slot's mask and bias on the host: 4-byte fields, sent only for slots that need them."""
    return np.dtype(
        [
            ("bias_ids", np.int32, (MAX_LOGIT_BIAS,)),
            ("bias", np.float32, (MAX_LOGIT_BIAS,)),
            ("mask", np.uint32, (-(-vocab // 32),)),
        ]
    )


def init_sampler_state(num_slots: int, vocab: int) -> SamplerState:
    """The state before any admission: every slot greedy, without processors or stop ids."""
    row = processor_row_dtype(vocab)
    arrays: dict[str, jax.Array] = {}
    for dtype in (SLOT_ROW, row):
        for name in dtype.names or ():
            field = dtype[name]
            arrays[name] = jnp.zeros((num_slots, *field.shape), field.base)
    arrays["prompt_seen"] = jnp.zeros((num_slots, vocab), bool)
    arrays["output_counts"] = jnp.zeros((num_slots, vocab), jnp.int32)
    assert arrays.keys() == {f.name for f in fields(SamplerState)}
    return SamplerState(**arrays)


def _write(
    state: SamplerState, dtype: np.dtype, slots: jax.Array, words: jax.Array
) -> SamplerState:
    changed: dict[str, jax.Array] = {}
    for name, (field, offset, *_) in (dtype.fields or {}).items():
        width = field.itemsize // 4
        columns = words[:, offset // 4 : offset // 4 + width]
        values = lax.bitcast_convert_type(columns, jnp.dtype(field.base))
        values = values.reshape(words.shape[0], *field.shape)
        changed[name] = getattr(state, name).at[slots].set(values, mode="drop")
    return replace(state, **changed)


def admit(state: SamplerState, slots: jax.Array, words: jax.Array) -> SamplerState:
    """Writes the scalars of newly admitted slots.

    Args:
      state: the state of all slots.
      slots: int32 [n]; entries ≥ num_slots are padding.
      words: int32 [n, SLOT_ROW_WORDS], SLOT_ROW records viewed as words.
    """
    return _write(state, SLOT_ROW, slots, words)


def admit_processors(state: SamplerState, slots: jax.Array, words: jax.Array) -> SamplerState:
    """Writes mask and bias of the slots that need them; as `admit`, with `processor_row_dtype`."""
    return _write(state, processor_row_dtype(state.vocab), slots, words)


def reset(state: SamplerState, keep: jax.Array) -> SamplerState:
    """Forgets the tokens seen by slots where `keep` (bool [slots]) is false: those just admitted.

    The cost follows their number; the buffers are changed in place when they are donated.
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
    return replace(state, prompt_seen=prompt_seen, output_counts=output_counts)


def observe(
    state: SamplerState,
    slots: jax.Array,
    tokens: jax.Array,
    live: jax.Array,
    axes: Axes = (),
) -> SamplerState:
    """Counts the newly sampled `tokens` of `slots` as output, where `live`; all are [rows]."""
    at = jnp.where(live, slots, state.num_slots)
    tokens = own(tokens, state.vocab, axes)
    return replace(state, output_counts=state.output_counts.at[at, tokens].add(1, mode="drop"))


def count_chunk(
    state: SamplerState,
    token_slots: jax.Array,
    tokens: jax.Array,
    is_prompt: jax.Array,
    live: jax.Array,
    axes: Axes = (),
) -> SamplerState:
    """Takes note of chunk tokens: of prompts as seen, of recomputed output as generated.

    Decode tokens must not be live here: `observe` has counted them when they were sampled.

    Args:
      state: the state of all slots; slots must have been `reset` at admission.
      token_slots: int32 [tokens].
      tokens: int32 [tokens], ids.
      is_prompt: bool [tokens], whether the token's position is inside the prompt.
      live: bool [tokens], false for padding and decode tokens.
      axes: see `rows`.
    """
    tokens = own(tokens, state.vocab, axes)
    prompt_at = jnp.where(live & is_prompt, token_slots, state.num_slots)
    output_at = jnp.where(live & ~is_prompt, token_slots, state.num_slots)
    return replace(
        state,
        prompt_seen=state.prompt_seen.at[prompt_at, tokens].set(True, mode="drop"),
        output_counts=state.output_counts.at[output_at, tokens].add(1, mode="drop"),
    )


def stop_code(
    state: SamplerState,
    slots: jax.Array,
    tokens: jax.Array,
    new_lengths: jax.Array,
    live: jax.Array,
) -> jax.Array:
    """Whether a sequence ends with its new token, as vLLM's `check_stop`: FinishCode, int32 [rows].

    Args:
      state: the state of all slots.
      slots: int32 [rows].
      tokens: int32 [rows], the new tokens.
      new_lengths: int32 [rows], prompt and output tokens, the new one included.
      live: bool [rows]; other rows are RUNNING.
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
