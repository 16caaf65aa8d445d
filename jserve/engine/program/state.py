"""The state kept on the device between steps: KV memory and the state of every slot."""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

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


@dataclass(frozen=True, slots=True)
class StateShape:
    """The static sizes that, with the model, fix the state."""

    layout: KVLayout
    kv_heads: int  # stored in a page, copies included
    num_slots: int
    num_pages: int  # of each group
    pages_per_slot: int
    kv_dtype: jnp.dtype


def init_state(model: Model, shape: StateShape) -> DeviceState:
    """The state of an idle engine, whose 8-bit pages have no scales yet; called while tracing."""
    spec, num_slots = model.spec, shape.num_slots

    def pages(group: PageGroup) -> tuple[jax.Array, ...]:
        size = kv_pages_shape(shape.num_pages, group.page_size, shape.kv_heads, spec.head_dim)
        return tuple(jnp.zeros(size, shape.kv_dtype) for _ in group.layers)

    def page_table(_: PageGroup) -> jax.Array:
        return jnp.zeros((num_slots, shape.pages_per_slot), jnp.int32)

    return DeviceState(
        kv=tuple(map(pages, shape.layout.groups)),
        kv_scales=jnp.ones((spec.layers, 2, shape.kv_heads), jnp.float32),
        page_tables=tuple(map(page_table, shape.layout.groups)),
        prompt_lens=jnp.zeros(num_slots, jnp.int32),
        lengths=jnp.zeros(num_slots, jnp.int32),
        last_tokens=jnp.zeros(num_slots, jnp.int32),
        active=jnp.zeros(num_slots, jnp.bool_),
        sampler=init_sampler_state(num_slots, spec.vocab),
    )


def abstract_state(model: Model, mesh: AnyMesh, shape: StateShape) -> DeviceState:
    """Shapes, types and shardings of the state."""
    state = jax.eval_shape(functools.partial(init_state, model, shape))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        state_shardings(state, mesh),
    )


def lower_state(model: Model, mesh: Mesh, shape: StateShape) -> jax.stages.Lowered:
    """The program of `init_state`: without arguments, it makes the state on its devices."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(model, mesh, shape))
    make = jax.jit(functools.partial(init_state, model, shape), out_shardings=shardings)
    return make.lower()


def state_shardings(state: DeviceState, mesh: AnyMesh) -> DeviceState:
    """The sharding of every leaf: pages are split evenly by KV heads, counts by token ids."""
    heads = named_sharding(mesh, (None, None, "kv_heads", None, None))
    replicated = named_sharding(mesh, ())
    sampler = ShardedSampler(mesh, state.sampler.vocab).state_specs(state.sampler)
    shardings: DeviceState = jax.tree.map(lambda _: replicated, state)
    return shardings._replace(
        kv=jax.tree.map(lambda _: heads, state.kv),
        kv_scales=named_sharding(mesh, SCALES_AXES),
        sampler=jax.tree.map(lambda spec: NamedSharding(mesh, spec), sampler),
    )
