"""Decode rows in the GPU kernel: each compute warpgroup walks over a split of a context."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jserve.pallas_kernels.gpu_launch import Memory, Ref
from jserve.pallas_kernels.ragged_paged_attention.gpu_items import ROWS, TILE, Shape
from jserve.pallas_kernels.ragged_paged_attention.gpu_memory import KEYS, VALUES, Tile, split_item
from jserve.pallas_kernels.ragged_paged_attention.gpu_softmax import (
    LOG2E,
    Block,
    Sums,
    attend,
    broadcast_rows,
    empty,
    iota,
    put_widened,
    store_outputs,
)


def _skip(memory: Memory, shape: Shape, used: jax.Array) -> None:
    """Releases a stage that the other warpgroup uses."""
    stage = lax.rem(used, jnp.int32(shape.stages))
    plgpu.barrier_wait(memory.keys_loaded.at[stage])
    plgpu.barrier_arrive(memory.keys_released.at[stage])
    plgpu.barrier_wait(memory.values_loaded.at[stage])
    plgpu.barrier_arrive(memory.values_released.at[stage])


class _Last(NamedTuple):
    """Place of the row's new token, if this is its last block."""

    here: jax.Array  # whether this is the row's last block
    place: jax.Array  # place of the new token in the block


def _with_token(
    memory: Memory, group: jax.Array, half: int, place: jax.Array, columns: tuple[Any, ...]
) -> Callable[[jax.Array], jax.Array]:
    """Puts the new token into a block, and zeros after it into V."""
    fresh = memory.fresh[group, half, columns[1]]
    fresh = plgpu.layout_cast(fresh, plgpu.Layout.WGMMA.reduce(0))

    def put(old: jax.Array) -> jax.Array:
        token = iota(old.shape, 0)
        if half == VALUES:
            old = jnp.where(token < place, old, jnp.zeros_like(old))
        return jnp.where(token == place, lax.broadcast_in_dim(fresh, old.shape, [1]), old)

    return put


def _decode_block(
    memory: Memory,
    shape: Shape,
    group: jax.Array,
    stage: jax.Array,
    seen: jax.Array | None,
    last: _Last | None,
) -> Block:
    """Makes a block ready where it was loaded."""
    plgpu.barrier_wait(memory.keys_loaded.at[stage])

    def patch(place: jax.Array) -> None:
        plgpu.barrier_wait(memory.values_loaded.at[stage])
        for half, part in ((KEYS, memory.keys), (VALUES, memory.values)):
            for column in range(0, shape.head_dim, 64):
                here = (slice(None), pl.ds(column, 64))
                old = plgpu.layout_cast(part[stage, *here], plgpu.Layout.WGMMA)
                part[stage, *here] = _with_token(memory, group, half, place, here)(old)
        plgpu.commit_smem()

    def values_ready() -> None:
        if last is None:
            plgpu.barrier_wait(memory.values_loaded.at[stage])
        else:
            pl.when(jnp.logical_not(last.here))(
                lambda: plgpu.barrier_wait(memory.values_loaded.at[stage])
            )

    if last is not None:
        pl.when(last.here)(lambda: patch(last.place))
    return Block(
        seen,
        memory.keys.at[stage],
        memory.values.at[stage],
        lambda: plgpu.barrier_arrive(memory.keys_released.at[stage]),
        values_ready,
        lambda: plgpu.barrier_arrive(memory.values_released.at[stage]),
    )


def _widened_decode_block(
    memory: Memory,
    shape: Shape,
    group: jax.Array,
    stage: jax.Array,
    seen: jax.Array | None,
    last: _Last | None,
) -> Block:
    """Makes a block ready by widening it, and puts the new token into it."""

    def widen(half: int, part: Ref, here: Ref, done: Ref) -> None:
        put = functools.partial(put_widened, memory, shape, group, part, stage)

        plgpu.barrier_wait(here.at[stage])
        if last is None:
            put(lambda old, _: old)
        else:
            token = functools.partial(_with_token, memory, group, half, last.place)
            pl.when(last.here)(lambda: put(lambda old, columns: token(columns)(old)))
            pl.when(jnp.logical_not(last.here))(lambda: put(lambda old, _: old))
        plgpu.barrier_arrive(done.at[stage])

    def values_ready() -> None:
        widen(VALUES, memory.values, memory.values_loaded, memory.values_released)

    widen(KEYS, memory.keys, memory.keys_loaded, memory.keys_released)
    here = memory.widened.at[group]
    return Block(seen, here, here, lambda: None, values_ready, lambda: None)


def _store_split(
    memory: Memory,
    shape: Shape,
    group: jax.Array,
    tile: Tile,
    index: jax.Array,
    sums: Sums,
) -> None:
    """Stores a split: as the output if the row has one split, else for `gpu_combine`."""
    out, peak, total = sums
    out = out / broadcast_rows(total, shape.head_dim)

    @pl.when(tile.number == 1)
    def _() -> None:
        store_outputs(memory, shape, group, tile, (tile.token, jnp.int32(1)), out)

    @pl.when(tile.number > 1)
    def _() -> None:
        heads = pl.ds(tile.head * shape.group, shape.group)
        rows = pl.ds(0, shape.group)
        weight = peak + jnp.log(total) * LOG2E
        memory.weight[group] = broadcast_rows(weight, 8)
        for column in range(0, shape.head_dim, shape.wide_columns):
            part = lax.slice(out, (0, column), (ROWS, column + shape.wide_columns))
            memory.wide[group] = part
            plgpu.commit_smem()
            if column == 0:
                plgpu.copy_smem_to_gmem(
                    memory.weight.at[group, rows], memory.part_weight.at[index, heads]
                )
            plgpu.copy_smem_to_gmem(
                memory.wide.at[group, rows],
                memory.part_out.at[index, heads, pl.ds(column, shape.wide_columns)],
            )
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _decode_queries(memory: Memory, shape: Shape, group: jax.Array, tile: Tile) -> None:
    """Loads the queries of one token and its K and V."""
    plgpu.copy_gmem_to_smem(
        memory.q.at[tile.head, pl.ds(pl.multiple_of(tile.queries, TILE), shape.query_rows)],
        memory.queries.at[group, pl.ds(0, shape.query_rows)],
        memory.queries_loaded.at[group],
    )
    for half, array in ((KEYS, memory.fresh_k), (VALUES, memory.fresh_v)):
        plgpu.copy_gmem_to_smem(
            array.at[tile.token, tile.head],
            memory.fresh.at[group, half],
            memory.fresh_loaded.at[group],
        )
    plgpu.barrier_wait(memory.queries_loaded.at[group])
    plgpu.barrier_wait(memory.fresh_loaded.at[group])


def compute_decode(
    memory: Memory, shape: Shape, group: jax.Array, item: jax.Array, used: jax.Array
) -> jax.Array:
    """Attends over this warpgroup's split; releases the other one's stages in their turn."""
    tile, index = split_item(memory, shape, item, group)
    other = split_item(memory, shape, item, 1 - group)[0]
    size = jnp.int32(shape.block)
    last = lax.div(tile.position, size)
    # The stages hold block 0 of both, block 1 of both, … and then the rest of the longer one.
    lead = group  # the first warpgroup's block comes before the second one's

    @pl.when(tile.blocks > 0)
    def _() -> None:
        _decode_queries(memory, shape, group, tile)

    def step(i: jax.Array, sums: Sums, *, masked: bool) -> Sums:
        here = used + i + jnp.minimum(i + lead, other.blocks)
        follows = (i + lead - 1 >= 0) & (i + lead - 1 < other.blocks)

        @pl.when(follows)
        def _() -> None:
            _skip(memory, shape, here - 1)

        stage = lax.rem(here, jnp.int32(shape.stages))
        block = tile.first + i
        seen: jax.Array | None = None
        ends: _Last | None = None
        if masked:
            place = tile.position - block * shape.block
            ends = _Last(block == last, place)
            token = iota((ROWS, shape.block), 1)
            seen = token <= place
            if shape.window:
                seen &= token > place - shape.window
        make = _widened_decode_block if shape.widens else _decode_block
        ready = make(memory, shape, group, stage, seen, ends)
        return attend(memory, shape, group, ready, sums, turns=False)

    left = jnp.int32(0)
    sums = empty(shape)
    masked, plain = functools.partial(step, masked=True), functools.partial(step, masked=False)
    if shape.window:
        hidden = tile.position - shape.window + shape.block
        left = lax.div(jnp.maximum(hidden, 0), size) - tile.first
        left = jnp.clip(left, 0, tile.blocks)
        sums = lax.fori_loop(0, left, masked, sums)
    right = jnp.clip(last - tile.first, left, tile.blocks)
    sums = lax.fori_loop(left, right, plain, sums)
    sums = lax.fori_loop(right, tile.blocks, masked, sums)
    # The rest of the other warpgroup's stages.
    passed = tile.blocks + jnp.minimum(jnp.maximum(tile.blocks + lead - 1, 0), other.blocks)

    def skip(i: jax.Array, _: None) -> None:
        _skip(memory, shape, used + i)

    lax.fori_loop(passed, tile.blocks + other.blocks, skip, None)

    @pl.when(tile.blocks > 0)
    def _() -> None:
        _store_split(memory, shape, group, tile, index, sums)

    return used + tile.blocks + other.blocks
