"""Counts of tokens that pass no chunk are what chunks would have counted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jserve.core.step import HISTORY_PAIRS
from jserve.model.sampling.history import history_row_dtype, history_rows
from jserve.model.sampling.sharded import ShardedSampler
from jserve.model.sampling.state import SamplerState, init_sampler_state
from jserve.model.sharding import device_mesh

SLOTS, VOCAB = 3, 1600


def _counted(sampler: ShardedSampler, slot: int, prompt: np.ndarray, output: np.ndarray):
    tokens = jnp.asarray(np.concatenate([prompt, output]), jnp.int32)
    is_prompt = jnp.arange(len(tokens)) < len(prompt)
    slots, live = jnp.full(len(tokens), slot), jnp.ones(len(tokens), bool)
    return sampler.count_chunk(init_sampler_state(SLOTS, VOCAB), slots, tokens, is_prompt, live)


@pytest.mark.parametrize(
    ("num_output", "devices"), [(0, 1), (1, 1), (700, 1), (2000, 1), (2000, 4)]
)
def test_history_is_what_chunks_count(num_output: int, devices: int) -> None:
    rng = np.random.default_rng(num_output)
    prompt = np.append(rng.integers(0, VOCAB, 900), VOCAB - 1)
    output = rng.integers(0, VOCAB, num_output)
    rows = history_rows(prompt.tolist(), output.tolist(), VOCAB)
    assert len(rows) == max(1, -(-len(set(output.tolist())) // HISTORY_PAIRS))
    words = np.zeros((6, history_row_dtype(VOCAB).itemsize // 4), np.int32)
    words[: len(rows)] = rows.view(np.int32).reshape(len(rows), -1)
    slots = np.full(6, SLOTS, np.int32)
    slots[: len(rows)] = 1
    sampler = ShardedSampler(device_mesh(jax.devices()[:devices], model=devices, expert=1), VOCAB)
    restore = jax.jit(sampler.restore)
    found: SamplerState = restore(
        init_sampler_state(SLOTS, VOCAB), jnp.asarray(slots), jnp.asarray(words)
    )
    expected = _counted(sampler, 1, prompt, output)
    np.testing.assert_array_equal(found.prompt_seen, expected.prompt_seen)
    np.testing.assert_array_equal(found.output_counts, expected.output_counts)
