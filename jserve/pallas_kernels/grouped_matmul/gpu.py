"""Grouped matmuls on Hopper GPUs: only experts that have rows are read.

XLA computes the ragged dot there as a dense one over masked copies of the rows, for all experts.
Here XLA only lists items, each of some rows of one expert. One launch then has a thread block for
each item and 128 outputs; `gpu_tile` draws what overlaps what inside. A block
finds its expert in the list, and the expert is a coordinate of the copies of its weights:

    item 0 (expert 3)   │ outputs 0… │ 128… │ … of all stacks of weights │
    item 1 (expert 3)      │ outputs 0… │ 128… │ …          the same weights, from the L2 cache
    item 2 (expert 7)         │ outputs 0… │ 128… │ …
    none                         │ blocks beyond the list end at once

An item starts anywhere among the rows, but a copy into the tiles that wgmma reads must start at a
multiple of 8 rows. So a tile of rows is 8 longer than an item. It holds some of the neighbours'
rows, which are computed and not written:

    row         0               8               16              24
    expert      a a a b b b b b b c c d d d d d d d d d …
    tile of b  [                               ]
    written           b b b b b b

Sums go to shared memory, and from there to the outputs in copies of power-of-two numbers of rows.
An output is summed over all inputs in order, whatever the item: a row's bits depend on nothing but
the row and its expert.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jserve.pallas_kernels.gpu_launch import (
    Buffer,
    Memory,
    Ref,
    gpu_kernel,
    operand,
    output,
    shared,
)
from jserve.pallas_kernels.gpu_tile import (
    COMPUTE,
    THREADS,
    multiply_tile,
    num_stages,
    store_transposed,
    tile_memory,
)

_OUTPUTS = 128  # outputs of a thread block; outputs of a weight are a multiple
_INPUTS = 128  # inputs of a stage of few rows; inputs of a weight are a multiple
_MIN_ROWS, _MAX_ROWS = 8, 128  # rows of an item; shared memory has no room for many more
_GROUP = 8  # tiles start at multiples of this row
_SHARED_BYTES = 216 * 1024  # shared memory for stages and sums
_EXPERT, _START, _COUNT = range(3)  # fields of an item


def fits(out_dim: int, in_dim: int, dtype: jnp.dtype) -> bool:
    """Whether the kernel takes weights of this shape and type."""
    return out_dim % _OUTPUTS == 0 and in_dim % _INPUTS == 0 and dtype in (jnp.bfloat16, jnp.int8)


def grouped_matmul(
    x: jax.Array, weights: Sequence[jax.Array], group_sizes: jax.Array
) -> tuple[jax.Array, ...]:
    """Implements `dispatch.grouped_matmul` for weights that fit."""
    rows, experts = x.shape[0], group_sizes.shape[0]
    width = item_rows(rows, experts)
    whole = max(-(-rows // _GROUP) * _GROUP, width + _GROUP)  # at least a tile
    padded = jnp.pad(x, ((0, whole - rows), (0, 0)))
    return tuple(_launch(list_items(group_sizes, rows, width), padded, weights, rows, width))


def item_rows(rows: int, experts: int) -> int:
    """Rows of an item: a power of two, about the share of an expert if all get the same."""
    share = max(rows // experts, 1)
    return min(max(1 << (share - 1).bit_length(), _MIN_ROWS), _MAX_ROWS)


def list_items(group_sizes: jax.Array, rows: int, width: int) -> jax.Array:
    """Lists expert, first row and number of rows of each item: int32 [items, 3].

    The list has room for the most items there can be; unused items have no rows.
    """
    experts = group_sizes.shape[0]
    num_items = rows // width + min(experts, rows)
    sizes = group_sizes.astype(jnp.int32)
    blocks = (sizes + width - 1) // width
    ends, last_blocks = jnp.cumsum(sizes), jnp.cumsum(blocks)
    item = jnp.arange(num_items, dtype=jnp.int32)
    expert = jnp.sum(last_blocks[None, :] <= item[:, None], axis=1, dtype=jnp.int32)
    owner = jnp.minimum(expert, experts - 1)
    start = (ends - sizes)[owner] + (item - (last_blocks - blocks)[owner]) * width
    count = jnp.where(expert < experts, jnp.minimum(ends[owner] - start, width), 0)
    return jnp.stack((owner, start, count), axis=1)


def _launch(
    items: jax.Array, x: jax.Array, weights: Sequence[jax.Array], rows: int, width: int
) -> Sequence[jax.Array]:
    half, height = _OUTPUTS // COMPUTE, width + _GROUP
    inputs = _INPUTS if height <= 64 else _INPUTS // 2
    dtype = weights[0].dtype
    stages = num_stages(_OUTPUTS, height, inputs, dtype, _SHARED_BYTES - height * _OUTPUTS * 4)
    tiles = sum(weight.shape[1] // _OUTPUTS for weight in weights)
    memory: dict[str, Buffer | list[Buffer]] = {
        "items": operand(items.shape, jnp.int32),
        "x": operand(x.shape, jnp.bfloat16),
        "weights": [operand(weight.shape, dtype) for weight in weights],
        "outs": [output((rows, weight.shape[1]), jnp.float32) for weight in weights],
        "sums": shared((COMPUTE, height, half), jnp.float32),
        **tile_memory(stages, _OUTPUTS, height, inputs, dtype),
    }
    launch = gpu_kernel(
        functools.partial(_body, width=width),
        memory,
        name="grouped_matmul",
        blocks=items.shape[0] * tiles,
        warpgroups=THREADS,
    )
    return launch(items=items, x=x, weights=list(weights))["outs"]


def _body(memory: Memory, *, width: int) -> None:
    """Finds the item of this thread block, then its outputs, and multiplies."""
    items, x, sums_here = memory.items, memory.x, memory.sums
    role = lax.axis_index("role")
    tiles = [weight.shape[1] // _OUTPUTS for weight in memory.weights]
    item = lax.div(lax.axis_index("block"), jnp.int32(sum(tiles)))
    tile = lax.rem(lax.axis_index("block"), jnp.int32(sum(tiles)))
    expert, start, count = (items[item, field] for field in (_EXPERT, _START, _COUNT))
    # The last tile is shifted back to end with the rows. TMA reads groups of 8 rows here: from any
    # other start it would silently fill in zeros past a group.
    height = width + _GROUP
    from_row = jnp.minimum(start - lax.rem(start, jnp.int32(_GROUP)), x.shape[0] - height)
    from_row = pl.multiple_of(from_row, _GROUP)
    first = 0
    for weight, out, weight_tiles in zip(memory.weights, memory.outs, tiles, strict=True):

        @pl.when((tile >= first) & (tile < first + weight_tiles) & (count > 0))
        def _(weight: Ref = weight, out: Ref = out, first: int = first) -> None:
            output = (tile - first) * _OUTPUTS

            def store(part: pl.Slice, sums: jax.Array) -> None:
                store_transposed(sums_here.at[role], sums)
                plgpu.commit_smem()
                columns = pl.ds(output + part.start, part.size)
                at = (start - from_row, start)
                _store_rows(sums_here.at[role], out.at[:, columns], *at, count, width)

            multiply_tile(
                x.at[pl.ds(from_row, height)],
                weight.at[expert, pl.ds(output, _OUTPUTS)],
                memory,
                role,
                store,
            )

        first += weight_tiles


def _store_rows(
    source: Ref,
    target: Ref,
    source_row: jax.Array,
    target_row: jax.Array,
    count: jax.Array,
    most: int,
) -> None:
    """Copies `count` rows, between 1 and `most`: the sizes of copies are static."""
    size = 1 << (min(most, target.shape[0]).bit_length() - 1)
    while size:

        @pl.when(count & size > 0)
        def _(size: int = size) -> None:
            done = count & -(2 * size)  # rows that larger copies have done
            plgpu.copy_smem_to_gmem(
                source.at[pl.ds(source_row + done, size)], target.at[pl.ds(target_row + done, size)]
            )

        size //= 2
    plgpu.wait_smem_to_gmem(0)
