"""History of a sequence that starts with computed pages: counts of tokens that no chunk brings."""

from collections import Counter
from collections.abc import Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int32

from jserve.core.step import HISTORY_PAIRS
from jserve.model.sampling.sharded_vocab import Axes, first_id, local_index
from jserve.model.sampling.state import SamplerState


def history_row_dtype(vocab: int) -> np.dtype:
    """One row of history on the host: 4-byte fields, sent only for slots with penalties."""
    return np.dtype(
        [
            ("prompt", np.uint32, (-(-vocab // 32),)),  # bit i % 32 of word i // 32: id i occurs
            ("tokens", np.int32, (HISTORY_PAIRS,)),  # output tokens; unused entries are `vocab`
            ("counts", np.int32, (HISTORY_PAIRS,)),
        ]
    )


def history_rows(prompt: Sequence[int], output: Sequence[int], vocab: int) -> np.ndarray:
    """Records [rows] with the ids of a prompt's computed tokens and the counts of its output's."""
    counts = Counter(output)
    rows = np.zeros(max(1, -(-len(counts) // HISTORY_PAIRS)), history_row_dtype(vocab))
    seen = np.zeros(-(-vocab // 32) * 32, bool)
    seen[list(prompt)] = True
    rows["prompt"][0] = np.packbits(seen, bitorder="little").view("<u4")
    for field, values, unused in (("tokens", counts.keys(), vocab), ("counts", counts.values(), 0)):
        flat = np.full(rows[field].shape, unused, np.int32)
        flat.reshape(-1)[: len(counts)] = list(values)
        rows[field] = flat
    return rows


def restore(
    state: SamplerState,
    slots: Int32[Array, " rows"],
    words: Int32[Array, "rows words"],
    axes: Axes = (),
) -> SamplerState:
    """Adds rows of history to the counts of their slots. The cost follows the used rows.

    Args:
      state: the state of all slots; slots must have been `reset` at admission.
      slots: used rows come first; entries ≥ num_slots are unused.
      words: `history_row_dtype` records viewed as words.
      axes: see `sharded_vocab`.
    """
    n = state.vocab  # size of this device's share
    prompt_words = words.shape[1] - 2 * HISTORY_PAIRS
    ids = jnp.arange(n, dtype=jnp.int32)
    if axes:
        ids += first_id(n, axes)

    def add(i: jax.Array, counted: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        seen, counts = counted
        prompt, tokens, times = jnp.split(words[i], (prompt_words, prompt_words + HISTORY_PAIRS))
        occurs = (prompt[ids >> 5] >> (ids & 31)) & 1 != 0
        at = (slots[i], jnp.zeros_like(slots[i]))
        before = lax.dynamic_slice(seen, at, (1, n))
        return (
            lax.dynamic_update_slice(seen, before | occurs[None], at),
            counts.at[slots[i], local_index(tokens, n, axes)].add(times, mode="drop"),
        )

    used = jnp.sum(slots < state.num_slots, dtype=jnp.int32)
    start = (state.prompt_seen, state.output_counts)
    found = cast(tuple[jax.Array, jax.Array], lax.fori_loop(0, used, add, start))
    return state._replace(prompt_seen=found[0], output_counts=found[1])
