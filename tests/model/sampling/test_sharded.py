"""The sampler over devices that share a vocabulary: bit for bit what one device samples."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from jserve.model.sampling.logprobs import Logprobs
from jserve.model.sampling.sample import Sampled, SamplerConfig
from jserve.model.sampling.sharded import ShardedSampler
from jserve.model.sampling.state import SamplerState
from jserve.model.sharding import device_mesh
from tests.model.sampling.sampling_reference import build, requests_of_every_kind

pytestmark = pytest.mark.optimized

FEW = SamplerConfig(num_candidates=8, tile_rows=2)


def _state(vocab: int) -> tuple[SamplerState, np.ndarray, jax.Array]:
    """Every kind of request, logits and positions."""
    params, logits, prompts, outputs, positions = requests_of_every_kind(vocab)
    choices = list(range(len(params)))
    state = build(params, vocab, prompts=prompts, outputs=outputs, choices=choices)
    return state, logits, jnp.asarray(positions)


def _spread(sampler: ShardedSampler, state: SamplerState) -> SamplerState:
    specs = sampler.state_specs(state)
    return jax.tree.map(
        lambda x, spec: jax.device_put(x, NamedSharding(sampler.mesh, spec)), state, specs
    )


# Shares in blocks of 64 ids and not, that begin inside of a word of the mask, that hold fewer ids
# than there are candidates or alternatives.
@pytest.mark.parametrize(
    ("model", "expert", "vocab"), [pytest.param(2, 1, 2048, marks=pytest.mark.sweep), (4, 2, 104)]
)
def test_as_one_device_samples(model: int, expert: int, vocab: int) -> None:
    devices = jax.devices()
    state, logits, positions = _state(vocab)
    slots = jnp.arange(len(logits), dtype=jnp.int32)
    live = jnp.ones(len(logits), bool)
    targets = jnp.asarray(np.random.default_rng(0).integers(0, vocab, len(logits)), jnp.int32)
    alone = ShardedSampler(device_mesh(devices[:1], model=1), vocab, FEW)
    mesh = device_mesh(devices[: model * expert], model=model, expert=expert)
    split = ShardedSampler(mesh, vocab, FEW)
    both = [jax.jit(partial(_sample, sampler)) for sampler in (alone, split)]
    states = state, _spread(split, state)
    for x in (logits, np.round(logits)):  # without ties, and with ties across all borders
        found = [
            call(x, own, slots, positions, live, targets)
            for call, own in zip(both, states, strict=True)
        ]
        jax.tree.map(np.testing.assert_array_equal, *found)


def _sample(
    sampler: ShardedSampler,
    x: jax.Array,
    state: SamplerState,
    slots: jax.Array,
    positions: jax.Array,
    live: jax.Array,
    targets: jax.Array,
) -> tuple[Sampled, Logprobs]:
    sampled = sampler.sample(x, state, slots, positions, live)
    return sampled, sampler.prompt_logprobs(x, targets)


def test_counts_are_those_of_one_device_and_stay_where_they_are() -> None:
    vocab = 104
    state, *_ = _state(vocab)
    mesh = device_mesh(jax.devices(), model=8)
    split, alone = (
        ShardedSampler(mesh, vocab),
        ShardedSampler(device_mesh(jax.devices()[:1], model=1), vocab),
    )
    rng = np.random.default_rng(1)
    ids = jnp.asarray(rng.integers(0, vocab, (2, 64)), jnp.int32)
    slots = jnp.asarray(rng.integers(0, state.num_slots, (2, 64)), jnp.int32)
    flags = jnp.asarray(rng.random((3, 64)) < 0.7)

    def update(sampler: ShardedSampler, state: SamplerState) -> SamplerState:
        state = sampler.reset(state, flags[0, : state.num_slots])
        state = sampler.count_chunk(state, slots[0], ids[0], flags[1], flags[2])
        return sampler.observe(state, slots[1], ids[1], flags[0])

    expected = jax.jit(partial(update, alone))(state)
    found = jax.jit(partial(update, split))(_spread(split, state))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert {part.data.shape for part in found.output_counts.addressable_shards} == {
        (state.num_slots, vocab // 8)
    }
