"""The state kept on the device between steps: KV memory and the state of every slot."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from jserve.cache.layout import KVLayout, PageGroup
from jserve.model.functional import Model
from jserve.model.sampling.sharded import ShardedSampler
from jserve.model.sampling.state import SamplerState, init_sampler_state
from jserve.model.sharding import AnyMesh, named_sharding
from jserve.pallas_kernels.ragged_paged_attention.dispatch import kv_pages_shape

SCALES_AXES = (None, None, "kv_heads")  # scales of K and V: [layers, K|V, stored_kv_heads]


class DeviceState(NamedTuple):
    """One donated pytree; only programs change it.

    Attributes:
      kv: per page group, the pages of each of its layers.
      kv_scales: [layers, K|V, stored_kv_heads] what K and V are divided by before 8 bits take them;
        pages of other floats know none.
      page_tables: per page group, [slots, pages_per_slot] page ids in order; a mirror of the
        host's, fed by deltas. Entries past a sequence's pages are stale.
      prompt_lens: [slots] tokens of the prompt; tokens past them are output.
      lengths: [slots] tokens whose K and V are in the pages.
      last_tokens: [slots] the newest sampled token, not yet in the pages.
      active: [slots] false from the step that finished a sequence until its slot is taken again.
      sampler: sampling parameters and counts.
    """

    kv: tuple[tuple[jax.Array, ...], ...]
    kv_scales: jax.Array
    page_tables: tuple[jax.Array, ...]
    prompt_lens: jax.Array
    lengths: jax.Array
    last_tokens: jax.Array
    active: jax.Array
    sampler: SamplerState


def init_state(
    model: Model,
    layout: KVLayout,
    *,
    kv_heads: int,
    num_slots: int,
    num_pages: int,
    pages_per_slot: int,
    kv_dtype: jnp.dtype,
) -> DeviceState:
    """An empty engine; pure, so that it can be evaluated abstractly or jitted with shardings."""
    spec = model.spec

    def pages(group: PageGroup) -> tuple[jax.Array, ...]:
        shape = kv_pages_shape(num_pages, group.page_size, kv_heads, spec.head_dim)
        return tuple(jnp.zeros(shape, kv_dtype) for _ in group.layers)

    return DeviceState(
        kv=tuple(map(pages, layout.groups)),
        kv_scales=jnp.ones((spec.layers, 2, kv_heads), jnp.float32),
        page_tables=tuple(jnp.zeros((num_slots, pages_per_slot), jnp.int32) for _ in layout.groups),
        prompt_lens=jnp.zeros(num_slots, jnp.int32),
        lengths=jnp.zeros(num_slots, jnp.int32),
        last_tokens=jnp.zeros(num_slots, jnp.int32),
        active=jnp.zeros(num_slots, jnp.bool_),
        sampler=init_sampler_state(num_slots, spec.vocab),
    )


def state_shardings(state: DeviceState, mesh: AnyMesh) -> DeviceState:
    """Pages are split by KV heads, of which each device has as many, counts by token ids."""
    heads = named_sharding(mesh, (None, None, "kv_heads", None, None))
    replicated = named_sharding(mesh, ())
    sampler = ShardedSampler(mesh, state.sampler.vocab).state_specs(state.sampler)
    shardings: DeviceState = jax.tree.map(lambda _: replicated, state)
    return shardings._replace(
        kv=jax.tree.map(lambda _: heads, state.kv),
        kv_scales=named_sharding(mesh, SCALES_AXES),
        sampler=jax.tree.map(lambda spec: NamedSharding(mesh, spec), sampler),
    )
