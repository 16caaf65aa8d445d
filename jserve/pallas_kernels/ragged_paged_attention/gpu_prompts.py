"""Prompts in the GPU kernel: two tiles of queries share blocks of K and V."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jserve.pallas_kernels.gpu_launch import Memory, Ref
from jserve.pallas_kernels.ragged_paged_attention.gpu_items import ROWS, TILE, Shape
from jserve.pallas_kernels.ragged_paged_attention.gpu_memory import Tile, prompt_item
from jserve.pallas_kernels.ragged_paged_attention.gpu_softmax import (
    Block,
    Sums,
    attend,
    broadcast_rows,
    empty,
    iota,
    put_widened,
    store_outputs,
    take_turn,
    wide,
)


def _patch_prompt(
    memory: Memory, shape: Shape, tile: Tile, block: jax.Array, stages: tuple[jax.Array, jax.Array]
) -> None:
    """Puts a block together from pages and the chunk's own K and V, with zeros in V after them."""
    stage, new_stage = stages
    own = tile.start - block * shape.block
    filled = tile.kv_len - block * shape.block

    @pl.when((own > 0) & (own < shape.block))
    def _() -> None:
        for part in (memory.keys, memory.values):
            for column in range(0, shape.head_dim, 64):
                here = (slice(None), pl.ds(column, 64))
                old = plgpu.layout_cast(part[stage, *here], plgpu.Layout.WGMMA)
                new = plgpu.layout_cast(part[new_stage, *here], plgpu.Layout.WGMMA)
                mine = iota((shape.block, 64), 0) >= own
                part[stage, *here] = jnp.where(mine, new, old)

    # A weight of zero does not silence a NaN in memory that was never written.
    @pl.when(filled < shape.block)
    def _() -> None:
        for column in range(0, shape.head_dim, 64):
            here = (slice(None), pl.ds(column, 64))
            old = plgpu.layout_cast(memory.values[stage, *here], plgpu.Layout.WGMMA)
            kept = jnp.where(iota((shape.block, 64), 0) < filled, old, jnp.zeros_like(old))
            memory.values[stage, *here] = kept

    plgpu.commit_smem()


class _PromptBlock(NamedTuple):
    """The stages of a block: one, or two if it has both pages and the chunk's own K and V."""

    tile: Tile
    block: jax.Array
    merges: jax.Array  # whether it has two stages
    stage: jax.Array
    new_stage: jax.Array


def _release(memory: Memory, item: _PromptBlock, done: Ref) -> None:
    """Releases K or V of the stages of a block."""
    plgpu.barrier_arrive(done.at[item.stage])
    pl.when(item.merges)(lambda: plgpu.barrier_arrive(done.at[item.new_stage]))


def _await(memory: Memory, item: _PromptBlock, here: Ref) -> None:
    plgpu.barrier_wait(here.at[item.stage])
    pl.when(item.merges)(lambda: plgpu.barrier_wait(here.at[item.new_stage]))


def _prompt_block(
    memory: Memory, shape: Shape, group: jax.Array, item: _PromptBlock, seen: jax.Array | None
) -> Block:
    """Makes a block ready where it was loaded; the first warpgroup puts it together for both."""
    tile, stage = item.tile, item.stage
    patches = item.merges
    if seen is not None:
        patches |= tile.kv_len < (item.block + 1) * shape.block
    _await(memory, item, memory.keys_loaded)

    @pl.when(patches)
    def _() -> None:
        _await(memory, item, memory.values_loaded)

        # The first warpgroup is ahead of the second one and never waits for it here.
        @pl.when(group == 0)
        def _() -> None:
            _patch_prompt(memory, shape, tile, item.block, (stage, item.new_stage))
            plgpu.barrier_arrive(memory.patched)

        @pl.when(group == 1)
        def _() -> None:
            plgpu.barrier_wait(memory.patched)

        @pl.when(item.merges)
        def _() -> None:
            plgpu.barrier_arrive(memory.keys_released.at[item.new_stage])
            plgpu.barrier_arrive(memory.values_released.at[item.new_stage])

    def values_ready() -> None:
        pl.when(jnp.logical_not(patches))(
            lambda: plgpu.barrier_wait(memory.values_loaded.at[stage])
        )

    return Block(
        seen,
        memory.keys.at[stage],
        memory.values.at[stage],
        lambda: plgpu.barrier_arrive(memory.keys_released.at[stage]),
        values_ready,
        lambda: plgpu.barrier_arrive(memory.values_released.at[stage]),
    )


def _widened_prompt_block(
    memory: Memory, shape: Shape, group: jax.Array, item: _PromptBlock, seen: jax.Array | None
) -> Block:
    """Makes a block ready: each warpgroup widens it for itself and puts it together on the way."""
    place = item.block * shape.block
    own, filled = item.tile.start - place, item.tile.kv_len - place

    def widen(part: Ref) -> None:
        def cut(values: jax.Array) -> jax.Array:
            if part is memory.keys or seen is None:
                return values
            return jnp.where(iota(values.shape, 0) < filled, values, jnp.zeros_like(values))

        def merged(old: jax.Array, columns: tuple[Any, ...]) -> jax.Array:
            new = wide(part, item.new_stage, columns)
            return cut(jnp.where(iota(old.shape, 0) < own, old, new))

        put = functools.partial(put_widened, memory, shape, group, part, item.stage)
        pl.when(item.merges)(lambda: put(merged))
        pl.when(jnp.logical_not(item.merges))(lambda: put(lambda old, _: cut(old)))

    def values_ready() -> None:
        _await(memory, item, memory.values_loaded)
        widen(memory.values)
        _release(memory, item, memory.values_released)

    _await(memory, item, memory.keys_loaded)
    widen(memory.keys)
    _release(memory, item, memory.keys_released)
    here = memory.widened.at[group]
    return Block(seen, here, here, lambda: None, values_ready, lambda: None)


def _prompt_queries(memory: Memory, shape: Shape, group: jax.Array, tile: Tile) -> None:
    row = pl.multiple_of(tile.queries + group * shape.tile_rows, TILE)
    plgpu.copy_gmem_to_smem(
        memory.q.at[tile.head, pl.ds(row, ROWS)],
        memory.queries.at[group],
        memory.queries_loaded.at[group],
    )
    plgpu.barrier_wait(memory.queries_loaded.at[group])


def compute_prompt(
    memory: Memory, shape: Shape, group: jax.Array, item: jax.Array, used: jax.Array
) -> jax.Array:
    """Attends with a tile over all blocks of its item; returns the number of stages used."""
    tile = prompt_item(memory, shape, item)
    _prompt_queries(memory, shape, group, tile)
    edge, straddles = tile.patch_block(shape), tile.straddles(shape)
    mine = tile.position + group * shape.tile
    # Taking turns, the second warpgroup holds a stage while the first one puts together two.
    turns = shape.stages > 2
    stages = jnp.int32(shape.stages)

    def step(block: jax.Array, carry: tuple[jax.Array, Sums], *, masked: bool):
        used, sums = carry
        merges = (block == edge) & (straddles > 0)
        seen = None
        if masked:
            # Row r is query r // group: for whole numbers, x ≤ r // group is x · group ≤ r.
            ahead = iota((ROWS, shape.block), 1) * shape.group - iota((ROWS, shape.block), 0)
            offset = (mine - block * shape.block) * shape.group
            seen = ahead <= offset
            if shape.window:
                seen &= ahead > offset - shape.window * shape.group
        make = _widened_prompt_block if shape.widens else _prompt_block
        item = _PromptBlock(tile, block, merges, lax.rem(used, stages), lax.rem(used + 1, stages))
        ready = make(memory, shape, group, item, seen)
        sums = attend(memory, shape, group, ready, sums, turns=turns)
        return used + 1 + merges.astype(jnp.int32), sums

    whole = lax.div(tile.position, jnp.int32(shape.block))
    left = tile.first
    carry = (used, empty(shape))
    if turns:
        pl.when(group == 1)(lambda: take_turn(memory))

    masked, plain = functools.partial(step, masked=True), functools.partial(step, masked=False)
    if shape.window:
        hidden = tile.position + tile.number - shape.window + shape.block - 1
        left = jnp.clip(lax.div(jnp.maximum(hidden, 0), jnp.int32(shape.block)), left, tile.end)
        carry = lax.fori_loop(tile.first, left, masked, carry)
    right = jnp.clip(whole, left, tile.end)
    carry = lax.fori_loop(left, right, plain, carry)
    used, (out, _, total) = lax.fori_loop(right, tile.end, masked, carry)

    if turns:
        pl.when(group == 0)(lambda: take_turn(memory))
    else:  # so that the first warpgroup is not ahead by more than a patch
        take_turn(memory)
    out = out / broadcast_rows(total, shape.head_dim)
    number = jnp.clip(tile.number - group * shape.tile, 0, shape.tile)
    first = tile.token + group * shape.tile
    store_outputs(memory, shape, group, tile, (first, number), out)
    return used
