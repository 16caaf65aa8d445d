"""What the roles of the GPU kernel share: its memory, its barriers, its items."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from jserve.pallas_kernels.ragged_paged_attention.gpu_items import (
    BLANK,
    COUNT,
    END,
    FIRST,
    KV_LEN,
    NEW,
    POSITION,
    QUERIES,
    ROW,
    ROWS,
    START,
    TOKEN,
    Shape,
)

COMPUTE = 2  # compute warpgroups
KEYS, VALUES = 0, 1

Ref = Any  # a Pallas reference


class Memory(NamedTuple):
    """Global memory, shared memory, barriers."""

    counts: Ref
    prompts: Ref
    splits: Ref
    table: Ref
    write_pages: Ref
    write_offsets: Ref
    q: Ref  # [kv_heads, query rows, head_dim], tiles at multiples of 8 rows
    k: Ref  # [tokens, kv_heads, head_dim]
    v: Ref
    new_k: Ref  # [new rows, kv_heads, head_dim], of prompts, blocks at multiples of 8 rows
    new_v: Ref
    fresh_k: Ref  # [decode tokens, kv_heads, head_dim], rounded to the type of pages
    fresh_v: Ref
    pages: Ref  # [pages · 2 · kv_heads, page_size, head_dim]
    out: Ref  # [tokens, q_heads, head_dim]
    part_out: Ref  # [split items, part_heads, head_dim]
    part_weight: Ref  # [split items, part_heads, 8], log2 of the sum of weights, 8 times
    queries: Ref  # from here on shared memory
    keys: Ref
    values: Ref
    fresh: Ref
    narrow: Ref
    wide: Ref
    weight: Ref
    writes: Ref
    blank: Ref
    queries_here: Ref  # from here on barriers
    keys_here: Ref
    values_here: Ref
    keys_done: Ref
    values_done: Ref
    fresh_here: Ref
    patched: Ref
    turn: Ref
    writes_here: Ref
    widened: Ref = None  # K, then V of a block for each compute warpgroup, if pages are narrower


def scratch(shape: Shape) -> list[Any]:
    """As `Memory` names them."""
    swizzled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    line_bytes = shape.lines * shape.kv_dtype.itemsize
    kv = (plgpu.TilingTransform((8, shape.lines)), plgpu.SwizzleTransform(line_bytes))
    widened = plgpu.SMEM((COMPUTE, shape.block, shape.head_dim), shape.dtype, transforms=swizzled)
    stage = plgpu.SMEM((shape.stages, shape.block, shape.head_dim), shape.kv_dtype, transforms=kv)
    full = plgpu.Barrier(num_arrivals=shape.pieces, num_barriers=shape.stages)
    free = plgpu.Barrier(num_arrivals=COMPUTE, num_barriers=shape.stages)
    q_heads = shape.kv_heads * shape.group
    return [
        plgpu.SMEM((COMPUTE, ROWS, shape.head_dim), shape.dtype, transforms=swizzled),
        stage,
        stage,
        plgpu.SMEM((COMPUTE, 2, shape.head_dim), shape.dtype),
        plgpu.SMEM((COMPUTE, ROWS, shape.columns), jnp.bfloat16),
        plgpu.SMEM((COMPUTE, ROWS, shape.wide_columns), jnp.float32),
        plgpu.SMEM((COMPUTE, ROWS, 8), jnp.float32),
        plgpu.SMEM((shape.writes, shape.kv_heads, shape.head_dim), shape.kv_dtype),
        plgpu.SMEM((-(-q_heads // 8) * 8, BLANK), jnp.bfloat16),
        plgpu.Barrier(num_barriers=COMPUTE),
        full,
        full,
        free,
        free,
        plgpu.Barrier(num_arrivals=2, num_barriers=COMPUTE),
        plgpu.Barrier(),
        plgpu.Barrier(num_arrivals=COMPUTE),
        plgpu.Barrier(num_barriers=shape.writes),
        *([widened] if shape.widens else []),
    ]


class Tile(NamedTuple):
    """An item for all roles: scalars."""

    row: jax.Array
    head: jax.Array
    token: jax.Array
    number: jax.Array  # tokens of a prompt; splits of a decode row
    position: jax.Array
    start: jax.Array
    kv_len: jax.Array
    first: jax.Array
    end: jax.Array
    queries: jax.Array  # row where the first tile's begin
    new: jax.Array  # row where position 0 would be among new K and V

    @property
    def blocks(self) -> jax.Array:
        """Their number."""
        return self.end - self.first

    def patch_block(self, shape: Shape) -> jax.Array:
        """The block in which pages end and the chunk's own K and V begin."""
        return lax.div(self.start, jnp.int32(shape.block))

    def straddles(self, shape: Shape) -> jax.Array:
        """Whether one block of this item has both."""
        block = self.patch_block(shape)
        inside = (block >= self.first) & (lax.rem(self.start, jnp.int32(shape.block)) > 0)
        return inside.astype(jnp.int32)


def _read(items: Ref, index: jax.Array, head: jax.Array) -> Tile:
    fields = (ROW, TOKEN, COUNT, POSITION, START, KV_LEN, FIRST, END, QUERIES, NEW)
    row, *rest = (items[index, field] for field in fields)
    return Tile(row, head, *rest)


def prompt_item(memory: Memory, shape: Shape, item: jax.Array) -> Tile:
    """Two tiles of queries of a KV head."""
    heads = jnp.int32(shape.kv_heads)
    return _read(memory.prompts, lax.div(item, heads), lax.rem(item, heads))


def split_item(
    memory: Memory, shape: Shape, visit: jax.Array, group: jax.Array | int
) -> tuple[Tile, jax.Array]:
    """A warpgroup's split of a visit and its place in the list; maybe one without blocks."""
    heads, twos = jnp.int32(shape.kv_heads), memory.counts[3]
    live = (group == 0) | (visit < twos)
    item = visit + jnp.minimum(visit, twos) + jnp.where(live, group, 0)
    index = lax.div(item, heads)
    tile = _read(memory.splits, index, lax.rem(item, heads))
    return tile._replace(end=jnp.where(live, tile.end, tile.first)), index


def each_item(
    memory: Memory,
    shape: Shape,
    prompt: Callable[[jax.Array, jax.Array], jax.Array] | None,
    decode: Callable[[jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """Walks this thread block's items, long ones first; carries the number of stages used."""
    num_prompts = memory.counts[0] if prompt is not None else jnp.int32(0)
    total = num_prompts + memory.counts[2]
    here, blocks = lax.axis_index("block"), jnp.int32(shape.blocks)
    rounds = lax.div(total, blocks)

    def place(turn: jax.Array) -> jax.Array:  # forth and back, so that each gets long and short
        there = jnp.where(lax.rem(turn, jnp.int32(2)) == 0, here, blocks - 1 - here)
        return turn * blocks + there

    rounds += (place(rounds) < total).astype(jnp.int32)

    def step(turn: jax.Array, stage: jax.Array) -> jax.Array:
        item = place(turn)
        if prompt is None:
            return decode(item, stage)
        first = functools.partial(prompt, item, stage)
        return lax.cond(item < num_prompts, first, lambda: decode(item - num_prompts, stage))

    return lax.fori_loop(0, rounds, step, jnp.int32(0))
