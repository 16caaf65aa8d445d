"""The GPU kernel's memory, declared once, and the items that its roles walk over."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from jserve.pallas_kernels.backend import GPU_HEAD_DIMS, GPU_PAGE_SIZES
from jserve.pallas_kernels.gpu_launch import (
    Buffer,
    Memory,
    Ref,
    barriers,
    operand,
    output,
    shared,
    shared_bytes,
)
from jserve.pallas_kernels.ragged_paged_attention.batch import RaggedBatch
from jserve.pallas_kernels.ragged_paged_attention.gpu_blocks import Blocks
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
    TILE,
    TOKEN,
    Shape,
    Work,
    up_to,
)

COMPUTE = 2  # compute warpgroups
_SHARED_BYTES = 227 * 1024 - 3 * 1024  # a Hopper multiprocessor's, less room for barriers
_COPY_BYTES = 128
KEYS, VALUES = 0, 1


def make_shape(
    q: jax.Array | jax.ShapeDtypeStruct,
    pages: jax.Array | jax.ShapeDtypeStruct,
    batch: RaggedBatch,
    window: int,
    blocks: Blocks,
) -> Shape:
    """Chooses sizes for these arguments. Raises ValueError for arguments the kernel cannot take."""
    tokens, q_heads, head_dim = q.shape
    _, _, kv_heads, page_size, _ = pages.shape
    rows, pages_per_row = batch.page_table.shape
    if head_dim not in GPU_HEAD_DIMS:
        raise ValueError(f"head_dim {head_dim} is none of {GPU_HEAD_DIMS}")
    if page_size not in GPU_PAGE_SIZES:
        raise ValueError(f"page_size {page_size} is none of {GPU_PAGE_SIZES}")
    if q.dtype != jnp.bfloat16:
        raise ValueError(f"queries are {q.dtype}; the tensor cores take bfloat16 here")
    if pages.dtype not in (jnp.bfloat16, jnp.float8_e4m3fn):
        raise ValueError(f"pages are {pages.dtype}, neither bfloat16 nor float8_e4m3fn")
    group = q_heads // kv_heads
    if group > ROWS or q_heads > 256 or kv_heads > 256 or (q_heads > ROWS and q_heads % 8):
        raise ValueError(f"{q_heads} query heads over {kv_heads} KV heads do not fit")
    sizes = blocks.sizes(head_dim)
    context = pages_per_row * page_size
    split = max(blocks.split, -(-context // blocks.max_splits // sizes.block) * sizes.block)
    # A copy begins at a multiple of 128 bytes of shared memory, as the outputs of a token do.
    columns = sizes.columns if group * sizes.columns * 2 % _COPY_BYTES == 0 else _COPY_BYTES // 2
    row_bytes = kv_heads * head_dim * pages.dtype.itemsize
    if row_bytes % _COPY_BYTES:
        raise ValueError(
            f"K of a token is {row_bytes} bytes ({kv_heads} heads of {head_dim}), no multiple of "
            f"{_COPY_BYTES}, which copies take; keep pages in bfloat16"
        )
    shape = Shape(
        tokens=tokens,
        kv_heads=kv_heads,
        group=group,
        head_dim=head_dim,
        page_size=page_size,
        pages_per_row=pages_per_row,
        rows=rows,
        window=window,
        block=sizes.block,
        stages=sizes.stages * 2 // pages.dtype.itemsize,
        split=split,
        columns=columns,
        wide_columns=sizes.wide_columns,
        writes=min(max(blocks.write_kib * 1024 // row_bytes, 1), 8),
        blocks=blocks.thread_blocks,
        kv_dtype=jnp.dtype(pages.dtype),
    )
    while (needed := _fit_bytes(shape)) > _SHARED_BYTES:
        if shape.stages > sizes.stages or (shape.writes == 1 and shape.stages > 2):
            shape = dataclasses.replace(shape, stages=shape.stages - 1)
        elif shape.writes > 1:
            shape = dataclasses.replace(shape, writes=shape.writes - 1)
        else:
            raise ValueError(
                f"{kv_heads} KV heads of {head_dim} take {needed} bytes of shared "
                f"memory; a thread block may have {_SHARED_BYTES}"
            )
    return shape


def _fit_bytes(shape: Shape) -> int:
    """Shared memory that the sizes are fitted to: at most 1 KiB more than is declared.

    It counts seven rows more in `blank`, as when tables of sizes were chosen; to count less would
    give some kernels another number of stages.
    """
    memory = on_chip(shape)
    blank = (shape.kv_heads * shape.group + 7, BLANK)
    return shared_bytes({**memory, "blank": shared(blank, jnp.bfloat16)})


def off_chip(shape: Shape, work: Work, num_pages: int) -> dict[str, Buffer]:
    """Operands and outputs of the kernel."""
    heads, dim = shape.kv_heads, shape.head_dim
    kv = operand((shape.tokens, heads, dim), shape.kv_dtype)
    # K and V of prompts, blocks at multiples of 8 rows.
    new = kv if work.new is None else operand((work.new.shape[0], heads, dim), shape.kv_dtype)
    # K and V of decode rows, rounded to the type of pages.
    fresh = operand((min(shape.rows, shape.tokens), heads, dim), shape.dtype)
    splits, part_heads = work.splits.shape[0], up_to(heads * shape.group, 8)
    return {
        "counts": operand(work.counts.shape, jnp.int32),
        "prompts": operand(work.prompts.shape, jnp.int32),
        "splits": operand(work.splits.shape, jnp.int32),
        "table": operand((shape.rows * shape.pages_per_row,), jnp.int32),
        "write_pages": operand((shape.tokens,), jnp.int32),
        "write_offsets": operand((shape.tokens,), jnp.int32),
        # Tiles of queries, at multiples of 8 rows.
        "q": operand((heads, work.queries.shape[0], dim), shape.dtype),
        "k": kv,
        "v": kv,
        "new_k": new,
        "new_v": new,
        "fresh_k": fresh,
        "fresh_v": fresh,
        # Planes of K and V: [page · K|V · kv_head, page_size, head_dim].
        "pages": operand((num_pages * 2 * heads, shape.page_size, dim), shape.kv_dtype),
        "out": output((shape.tokens, heads * shape.group, dim), jnp.bfloat16),
        "part_out": output((splits, part_heads, dim), jnp.float32),
        # The log2 of the sum of weights, 8 times.
        "part_weight": output((splits, part_heads, 8), jnp.float32),
    }


def on_chip(shape: Shape) -> dict[str, Buffer]:
    """Shared memory and barriers of a thread block."""
    heads, dim = shape.kv_heads, shape.head_dim
    # Rows of shared memory that copies fill stand in tiles of 8, as wgmma reads them.
    swizzled = (plgpu.TilingTransform((TILE, 64)), plgpu.SwizzleTransform(128))
    line_bytes = shape.lines * shape.kv_dtype.itemsize
    in_lines = (plgpu.TilingTransform((TILE, shape.lines)), plgpu.SwizzleTransform(line_bytes))
    stages = shared((shape.stages, shape.block, dim), shape.kv_dtype, in_lines)
    loaded = barriers(shape.stages, arrivals=shape.pieces)
    released = barriers(shape.stages, arrivals=COMPUTE)
    memory = {
        "queries": shared((COMPUTE, ROWS, dim), shape.dtype, swizzled),
        "keys": stages,
        "values": stages,
        "fresh": shared((COMPUTE, 2, dim), shape.dtype),
        "narrow": shared((COMPUTE, ROWS, shape.columns), jnp.bfloat16),
        "wide": shared((COMPUTE, ROWS, shape.wide_columns), jnp.float32),
        "weight": shared((COMPUTE, ROWS, 8), jnp.float32),
        "writes": shared((shape.writes, heads, dim), shape.kv_dtype),
        "blank": shared((up_to(heads * shape.group, 8), BLANK), jnp.bfloat16),
        "queries_loaded": barriers(COMPUTE),
        "keys_loaded": loaded,
        "values_loaded": loaded,
        "keys_released": released,
        "values_released": released,
        "fresh_loaded": barriers(COMPUTE, arrivals=2),
        "patched": barriers(),
        "turn": barriers(arrivals=COMPUTE),
        "writes_loaded": barriers(shape.writes),
    }
    if shape.widens:
        # K, then V of a block for each compute warpgroup.
        memory["widened"] = shared((COMPUTE, shape.block, dim), shape.dtype, swizzled)
    return memory


class Tile(NamedTuple):
    """An item, as scalars, for all roles."""

    row: jax.Array
    head: jax.Array
    token: jax.Array
    number: jax.Array  # tokens of a prompt; splits of a decode row
    position: jax.Array
    start: jax.Array
    kv_len: jax.Array
    first: jax.Array
    end: jax.Array
    queries: jax.Array  # row where the queries of the first tile begin
    new: jax.Array  # place of position 0 among new K and V

    @property
    def blocks(self) -> jax.Array:
        """Number of KV blocks of this item."""
        return self.end - self.first

    def patch_block(self, shape: Shape) -> jax.Array:
        """The block in which pages end and the chunk's own K and V begin."""
        return lax.div(self.start, jnp.int32(shape.block))

    def straddles(self, shape: Shape) -> jax.Array:
        """Whether one block of this item has both pages and the chunk's own K and V."""
        block = self.patch_block(shape)
        inside = (block >= self.first) & (lax.rem(self.start, jnp.int32(shape.block)) > 0)
        return inside.astype(jnp.int32)


def _read(items: Ref, index: jax.Array, head: jax.Array) -> Tile:
    fields = (ROW, TOKEN, COUNT, POSITION, START, KV_LEN, FIRST, END, QUERIES, NEW)
    row, *rest = (items[index, field] for field in fields)
    return Tile(row, head, *rest)


def prompt_item(memory: Memory, shape: Shape, item: jax.Array) -> Tile:
    """Reads a prompt item: two tiles of queries of a KV head."""
    heads = jnp.int32(shape.kv_heads)
    return _read(memory.prompts, lax.div(item, heads), lax.rem(item, heads))


def split_item(
    memory: Memory, shape: Shape, visit: jax.Array, group: jax.Array | int
) -> tuple[Tile, jax.Array]:
    """Reads a warpgroup's split of a visit, which may have no blocks, and its index in the list."""
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
    """Walks this thread block's items, long ones first; returns the number of stages used."""
    num_prompts = memory.counts[0] if prompt is not None else jnp.int32(0)
    total = num_prompts + memory.counts[2]
    here, blocks = lax.axis_index("block"), jnp.int32(shape.blocks)
    rounds = lax.div(total, blocks)

    def place(
        turn: jax.Array,
    ) -> jax.Array:  # there and back, so that each thread block gets long and short items
        there = jnp.where(lax.rem(turn, jnp.int32(2)) == 0, here, blocks - 1 - here)
        return turn * blocks + there

    rounds += (place(rounds) < total).astype(jnp.int32)

    def step(turn: jax.Array, used: jax.Array) -> jax.Array:
        item = place(turn)
        if prompt is None:
            return decode(item, used)
        first = functools.partial(prompt, item, used)
        return lax.cond(item < num_prompts, first, lambda: decode(item - num_prompts, used))

    return lax.fori_loop(0, rounds, step, jnp.int32(0))
