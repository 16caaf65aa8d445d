"""Running softmax, outputs and widened blocks of a tile of queries in the GPU kernel."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jserve.pallas_kernels.gpu_launch import Memory, Ref
from jserve.pallas_kernels.ragged_paged_attention.gpu_items import ROWS, Shape
from jserve.pallas_kernels.ragged_paged_attention.gpu_memory import Tile

_MASKED = -1e30  # finite, so that a fully masked block leaves the running softmax unchanged
LOG2E = math.log2(math.e)

Sums = tuple[jax.Array, jax.Array, jax.Array]  # out [64, head_dim], peak [64], total [64]


def iota(shape: tuple[int, ...], axis: int) -> jax.Array:
    """Indices along an axis, in the layout of wgmma's results."""
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)


def broadcast_rows(values: jax.Array, columns: int) -> jax.Array:
    """Broadcasts [64] to [64, columns]."""
    return lax.broadcast_in_dim(values, (ROWS, columns), [0])


def empty(shape: Shape) -> Sums:
    """Sums over no blocks."""
    layout = plgpu.Layout.WGMMA
    return (
        plgpu.layout_cast(jnp.zeros((ROWS, shape.head_dim), jnp.float32), layout),
        plgpu.layout_cast(jnp.full((ROWS,), _MASKED, jnp.float32), layout.reduce(1)),
        plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), layout.reduce(1)),
    )


def take_turn(memory: Memory) -> None:
    """Waits until the other compute warpgroup arrives here as well."""
    plgpu.barrier_arrive(memory.turn)
    plgpu.barrier_wait(memory.turn)


class Block(NamedTuple):
    """A block of K and V, ready for a compute warpgroup."""

    seen: jax.Array | None  # [64, block]; None if all are seen
    keys: Ref  # [block, head_dim] in shared memory
    values: Ref
    keys_used: Callable[[], None]  # called when `keys` has been read
    values_ready: Callable[[], None]  # returns when `values` can be read
    values_used: Callable[[], None]


def attend(
    memory: Memory, shape: Shape, group: jax.Array, block: Block, sums: Sums, *, turns: bool
) -> Sums:
    """Adds one block to the running softmax (Milakov and Gimelshein, 2018), in powers of 2."""
    out, peak, total = sums

    def multiply_keys(scores: Ref) -> jax.Array:
        keys = plgpu.transpose_ref(block.keys, (1, 0))
        plgpu.wgmma(scores, memory.queries.at[group], keys)
        if turns:
            take_turn(memory)
        return scores[...]

    scores = pl.run_scoped(
        multiply_keys, plgpu.WGMMAAccumulatorRef((ROWS, shape.block), jnp.float32)
    )
    block.keys_used()
    if block.seen is not None:
        scores = jnp.where(block.seen, scores, _MASKED)
    new_peak = jnp.maximum(peak, jnp.max(scores, axis=1) * LOG2E)
    fade = jnp.exp2(peak - new_peak)
    weights = jnp.exp2(scores * LOG2E - broadcast_rows(new_peak, shape.block))
    total = total * fade + jnp.sum(weights, axis=1)
    out = out * broadcast_rows(fade, shape.head_dim)
    narrow = weights.astype(shape.dtype)
    if turns:
        out, total, new_peak, narrow = lax.optimization_barrier((out, total, new_peak, narrow))
        plgpu.barrier_arrive(memory.turn)

    block.values_ready()
    if turns:
        plgpu.barrier_wait(memory.turn)

    def add_values(acc: Ref) -> None:
        if shape.head_dim <= 128:
            plgpu.wgmma(acc, narrow, block.values)
            return
        # One instruction may not need more registers than a thread has when the kernel starts.
        for column in range(0, shape.head_dim, 128):
            here = (slice(None), pl.ds(column, 128))
            plgpu.wgmma(acc.at[here], narrow, block.values.at[here])

    accumulator: Any = plgpu.WGMMAAccumulatorRef.init(out)
    out = pl.run_state(add_values)(accumulator)
    block.values_used()
    return out, new_peak, total


def store_outputs(
    memory: Memory,
    shape: Shape,
    group: jax.Array,
    tile: Tile,
    tokens: tuple[jax.Array, jax.Array],
    out: jax.Array,
) -> None:
    """Writes the rows of `tokens` (first, number), some columns at a time."""
    first, number = tokens
    heads = pl.ds(tile.head * shape.group, shape.group)
    for column in range(0, shape.head_dim, shape.columns):
        part = lax.slice(out, (0, column), (ROWS, column + shape.columns))
        memory.narrow[group] = part.astype(jnp.bfloat16)
        plgpu.commit_smem()

        def store(i: jax.Array, _: None, column: int = column) -> None:
            plgpu.copy_smem_to_gmem(
                memory.narrow.at[group, pl.ds(i * shape.group, shape.group)],
                memory.out.at[first + i, heads, pl.ds(column, shape.columns)],
            )

        lax.fori_loop(0, number, store, None)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def wide(part: Ref, stage: jax.Array, columns: tuple[Any, ...]) -> jax.Array:
    """Widens some columns of K or V of a stage to float16, which holds every float8_e4m3fn."""
    narrow = plgpu.layout_cast(part[stage, *columns], plgpu.Layout.WGMMA_UPCAST_2X)
    return plgpu.layout_cast(narrow.astype(jnp.float16), plgpu.Layout.WGMMA)


def put_widened(
    memory: Memory,
    shape: Shape,
    group: jax.Array,
    part: Ref,
    stage: jax.Array,
    change: Callable[[jax.Array, tuple[Any, ...]], jax.Array],
) -> None:
    """Widens a stage, applies `change`, and stores it where this warpgroup's wgmma reads it."""
    for column in range(0, shape.head_dim, shape.lines):
        columns = (slice(None), pl.ds(column, shape.lines))
        memory.widened[group, *columns] = change(wide(part, stage, columns), columns)
    plgpu.commit_smem()
