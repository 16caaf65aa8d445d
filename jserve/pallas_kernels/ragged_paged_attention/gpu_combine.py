"""Combines the splits of decode rows on Hopper GPUs, in the order of their positions.

A thread block takes 64 query heads and some columns of a row at a time. Partial results arrive
in a ring, several ahead:

    TMA      │ 0 │ 1 │ 2 │ 3 │     │ 4 │     │ 5 │
    compute                  │ 0   │ 1       │ 2   │ …       running softmax over the splits
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jserve.pallas_kernels.gpu_launch import Memory, barriers, gpu_kernel, operand, shared

_ROWS = 64
_COLUMNS = 64
_AHEAD = 4
_MASKED = -1e30
_LOG2E = math.log2(math.e)


def _kernel(memory: Memory, *, heads: int, blocks: int) -> None:
    rows = memory.row_splits.shape[0]
    _, q_heads, head_dim = memory.out.shape
    tiles, columns = memory.part_out.shape[1] // heads, head_dim // _COLUMNS
    real = min(heads, q_heads)
    layout = plgpu.Layout.WGMMA

    def one(item: jax.Array, _: None) -> None:
        item = item * blocks + lax.axis_index("block")
        row = lax.div(item, jnp.int32(tiles * columns))
        tile = lax.rem(lax.div(item, jnp.int32(columns)), jnp.int32(tiles))
        column = lax.rem(item, jnp.int32(columns))
        number = memory.row_splits[row, 1]

        @pl.when(number > 1)
        def _() -> None:
            first, token = memory.row_splits[row, 0], memory.row_splits[row, 2]
            head = pl.ds(tile * heads, heads)
            real_head = pl.ds(tile * heads, real)
            across = pl.ds(column * _COLUMNS, _COLUMNS)

            def fetch(i: jax.Array) -> None:
                stage = lax.rem(i, jnp.int32(_AHEAD))
                loaded = memory.loaded.at[stage]
                into = memory.sums.at[stage, pl.ds(0, heads)]
                plgpu.copy_gmem_to_smem(memory.part_out.at[first + i, head, across], into, loaded)
                into = memory.weights.at[stage, pl.ds(0, heads)]
                plgpu.copy_gmem_to_smem(memory.part_weight.at[first + i, head], into, loaded)

            lax.fori_loop(0, jnp.minimum(number, _AHEAD), lambda i, _: fetch(i), None)

            def add(i: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]):
                out, peak, total = carry
                stage = lax.rem(i, jnp.int32(_AHEAD))
                plgpu.barrier_wait(memory.loaded.at[stage])
                part = plgpu.layout_cast(memory.sums[stage], layout)
                weight = jnp.max(plgpu.layout_cast(memory.weights[stage], layout), axis=1)

                @pl.when(i + _AHEAD < number)
                def _() -> None:
                    plgpu.commit_smem()  # all warps have read the stage
                    fetch(i + _AHEAD)

                new_peak = jnp.maximum(peak, weight)
                fade, share = jnp.exp2(peak - new_peak), jnp.exp2(weight - new_peak)
                wide = functools.partial(
                    lax.broadcast_in_dim, shape=(_ROWS, _COLUMNS), broadcast_dimensions=[0]
                )
                return out * wide(fade) + part * wide(share), new_peak, total * fade + share

            empty = (
                plgpu.layout_cast(jnp.zeros((_ROWS, _COLUMNS), jnp.float32), layout),
                plgpu.layout_cast(jnp.full((_ROWS,), _MASKED, jnp.float32), layout.reduce(1)),
                plgpu.layout_cast(jnp.zeros((_ROWS,), jnp.float32), layout.reduce(1)),
            )
            out, _, total = lax.fori_loop(0, number, add, empty)
            out = out / lax.broadcast_in_dim(total, out.shape, [0])
            memory.result[...] = out.astype(jnp.bfloat16)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(
                memory.result.at[pl.ds(0, real)], memory.out.at[token, real_head, across]
            )
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    items = rows * tiles * columns
    mine = lax.div(jnp.int32(items - 1) - lax.axis_index("block"), jnp.int32(blocks)) + 1
    lax.fori_loop(0, mine, one, None)


def _swizzled(columns: int) -> tuple[Any, ...]:
    return plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(4 * columns)


def combine(
    out: jax.Array,  # [tokens, q_heads, head_dim] bfloat16, updated in place
    part_out: jax.Array,  # [parts, part_heads, head_dim] float32; part_heads: q_heads up to 8n
    part_weight: jax.Array,  # [parts, part_heads, 8] float32: log2 of the sum of weights, 8 times
    row_splits: jax.Array,  # [rows, 4] int32: first part, number of parts, token, 0
    *,
    blocks: int,
) -> jax.Array:
    """Fills in the outputs of the tokens of rows that have several parts."""
    head_dim, part_heads = out.shape[2], part_out.shape[1]
    heads = max(size for size in range(8, _ROWS + 1, 8) if part_heads % size == 0)
    items = row_splits.shape[0] * (part_heads // heads) * (head_dim // _COLUMNS)
    blocks = min(blocks, items)
    target = jax.new_ref(out, memory_space=plgpu.GMEM)
    memory = {
        "row_splits": operand(row_splits.shape, jnp.int32),
        "part_out": operand(part_out.shape, jnp.float32),
        "part_weight": operand((*part_out.shape[:2], 8), jnp.float32),
        "out": operand(out.shape, jnp.bfloat16),
        "sums": shared((_AHEAD, _ROWS, _COLUMNS), jnp.float32, _swizzled(32)),
        "weights": shared((_AHEAD, _ROWS, 8), jnp.float32, _swizzled(8)),
        "result": shared((_ROWS, _COLUMNS), jnp.bfloat16),
        "loaded": barriers(_AHEAD, arrivals=2),
    }
    kernel = functools.partial(_kernel, heads=heads, blocks=blocks)
    launch = gpu_kernel(kernel, memory, name="combine_splits", blocks=blocks)
    launch(row_splits=row_splits, part_out=part_out, part_weight=part_weight, out=target)
    return jax.freeze(target)
