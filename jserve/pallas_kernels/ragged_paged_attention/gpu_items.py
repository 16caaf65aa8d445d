"""What the GPU kernel walks over: its sizes, and lists of work made by a few XLA operations.

The lists depend on the batch alone, so that XLA computes them once for all layers.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Int

from jserve.pallas_kernels.backend import GPU_HEAD_DIMS, GPU_PAGE_SIZES
from jserve.pallas_kernels.ragged_paged_attention.batch import RaggedBatch
from jserve.pallas_kernels.ragged_paged_attention.gpu_blocks import Blocks

ROWS = 64  # queries · grouped heads in one product of a warpgroup: what wgmma takes
BLANK = 32  # columns of zeros for the outputs of tokens that belong to no row
_SMEM_BYTES = 227 * 1024  # of a Hopper multiprocessor, for one block of threads
_COPY_BYTES = 128
_SMEM_RESERVE = 3 * 1024  # barriers, and what the compiler takes for itself

# Fields of an item.
ROW, TOKEN, COUNT, POSITION, START, KV_LEN, FIRST, END = range(8)
FIELDS = 8


@dataclass(frozen=True, slots=True)
class Shape:
    """What the kernel is specialized to."""

    tokens: int
    kv_heads: int
    group: int  # query heads of a KV head
    head_dim: int
    page_size: int
    pages_per_row: int
    rows: int
    window: int
    block: int  # tokens of K and V in one stage
    stages: int
    split: int  # tokens of a decode row that one warpgroup walks over
    columns: int  # of an output that are written at a time
    wide_columns: int  # of a part of an output, in float32
    writes: int  # rows of K or V that are on their way to their pages together
    blocks: int  # thread blocks of the launch
    kv_dtype: jnp.dtype

    @property
    def widens(self) -> bool:
        """Whether K and V are made wider before the tensor cores take them."""
        return self.kv_dtype.itemsize == 1

    @property
    def dtype(self) -> jnp.dtype:
        """What the tensor cores take: every float8_e4m3fn is a float16, and cheap to make one."""
        return jnp.dtype(jnp.float16 if self.widens else jnp.bfloat16)

    @property
    def lines(self) -> int:
        """Columns of K and V that stand together in shared memory: 128 bytes, if there are."""
        return min(128 // self.kv_dtype.itemsize, self.head_dim)

    @property
    def tile(self) -> int:
        """Query tokens of a warpgroup."""
        return ROWS // self.group

    @property
    def pieces(self) -> int:
        """Copies that fill K or V of a stage: one for each page."""
        return max(self.block // self.page_size, 1)

    @property
    def max_splits(self) -> int:
        """Of a decode row."""
        return -(-self.pages_per_row * self.page_size // self.split)

    @property
    def query_rows(self) -> int:
        """Rows of the queries that a decode warpgroup loads: whole tiles of shared memory."""
        return -(-self.group // 8) * 8


def shape_of(
    q: jax.Array, pages: jax.Array, batch: RaggedBatch, window: int, blocks: Blocks
) -> Shape:
    """Sizes for these arguments. Raises ValueError for what the kernel cannot hold."""
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
    while smem_bytes(shape) > _SMEM_BYTES:
        if shape.stages > sizes.stages or (shape.writes == 1 and shape.stages > 2):
            shape = dataclasses.replace(shape, stages=shape.stages - 1)
        elif shape.writes > 1:
            shape = dataclasses.replace(shape, writes=shape.writes - 1)
        else:
            raise ValueError(
                f"{kv_heads} KV heads of {head_dim} take {smem_bytes(shape)} bytes of shared "
                f"memory; a multiprocessor has {_SMEM_BYTES}"
            )
    return shape


def smem_bytes(shape: Shape) -> int:
    """Shared memory of a thread block."""
    wide = shape.kv_dtype.itemsize
    queries = 2 * ROWS * shape.head_dim * 2
    stages = shape.stages * 2 * shape.block * shape.head_dim * wide
    outputs = 2 * ROWS * (shape.columns * 2 + shape.wide_columns * 4 + 8 * 4)
    fresh = 2 * 2 * shape.head_dim * 2
    writes = shape.writes * shape.kv_heads * shape.head_dim * wide
    blank = (shape.kv_heads * shape.group + 7) * BLANK * 2
    widened = 2 * shape.block * shape.head_dim * 2 if shape.widens else 0
    parts = (queries, stages, outputs, fresh, writes, blank, widened)
    return sum(math.ceil(part / 1024) * 1024 for part in parts) + _SMEM_RESERVE


class Work(NamedTuple):
    """Lists of items; an item of a list stands for all KV heads, one after another."""

    prompts: Int[jax.Array, "prompt_items fields"]
    splits: Int[jax.Array, "split_items fields"]  # COUNT is the number of the row's splits
    counts: Int[jax.Array, "4"]  # prompt items, split items, prompt items · heads, …
    row_splits: Int[jax.Array, "rows 4"]  # first item, number, token, 0


def _spread(counts: jax.Array, length: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Row and place in the row of each item, and the first item of each row."""
    ends = jnp.cumsum(counts)
    index = jnp.arange(length, dtype=jnp.int32)
    row = jnp.searchsorted(ends, index, side="right", method="scan_unrolled").astype(jnp.int32)
    row = jnp.minimum(row, counts.shape[0] - 1)
    starts = (ends - counts).astype(jnp.int32)
    return row, index - starts[row], starts


def work_of(batch: RaggedBatch, shape: Shape, *, prompts: bool) -> Work:
    """Splits of decode rows and tiles of prompts, the longest of a prompt first."""
    index = jnp.arange(shape.rows, dtype=jnp.int32)
    live = batch.q_lens > 0
    seen_from = jnp.maximum(batch.kv_lens - shape.window, 0) if shape.window else 0
    first_split = seen_from // shape.split
    number = (batch.kv_lens + shape.split - 1) // shape.split - first_split
    number = jnp.where(live & (index < batch.num_decode), number, 0).astype(jnp.int32)
    row, place, starts = _spread(number, shape.rows * shape.max_splits)
    kv_len = batch.kv_lens[row]
    begin = (jnp.broadcast_to(first_split, (shape.rows,))[row] + place) * shape.split
    begin_seen = jnp.maximum(begin, jnp.broadcast_to(seen_from, (shape.rows,))[row])
    end = jnp.minimum(begin + shape.split, kv_len)
    splits = {
        ROW: row,
        TOKEN: batch.q_starts[row],
        COUNT: number[row],
        POSITION: kv_len - 1,
        START: kv_len - 1,
        KV_LEN: kv_len,
        FIRST: begin_seen // shape.block,
        END: (end + shape.block - 1) // shape.block,
    }
    row_splits = jnp.stack([starts, number, batch.q_starts, jnp.zeros_like(starts)], axis=1)
    tiles = _no_items(1)
    num_tiles = jnp.int32(0)
    if prompts:
        tiles, num_tiles = _tiles(batch, shape, live & (index >= batch.num_decode))
    num_splits = jnp.sum(number)
    counts = jnp.stack(
        [num_tiles, num_splits, num_tiles * shape.kv_heads, num_splits * shape.kv_heads]
    )
    return Work(_table(tiles), _table(splits), counts.astype(jnp.int32), row_splits)


def _tiles(
    batch: RaggedBatch, shape: Shape, prompt: jax.Array
) -> tuple[dict[int, jax.Array], jax.Array]:
    """Pairs of tiles of prompt rows, one for each compute warpgroup."""
    size = 2 * shape.tile
    prompt &= jnp.arange(shape.rows) < batch.num_rows
    number = jnp.where(prompt, (batch.q_lens + size - 1) // size, 0).astype(jnp.int32)
    row, place, _ = _spread(number, shape.tokens // size + shape.rows)
    offset = (number[row] - 1 - place) * size
    kv_len, q_len = batch.kv_lens[row], batch.q_lens[row]
    start = kv_len - q_len
    position = start + offset
    count = jnp.clip(q_len - offset, 0, size)
    seen_from = jnp.maximum(position - shape.window + 1, 0) if shape.window else 0 * position
    items = {
        ROW: row,
        TOKEN: batch.q_starts[row] + offset,
        COUNT: count,
        POSITION: position,
        START: start,
        KV_LEN: kv_len,
        FIRST: seen_from // shape.block,
        END: (position + count + shape.block - 1) // shape.block,
    }
    return items, jnp.sum(number)


def _no_items(length: int) -> dict[int, jax.Array]:
    return {field: jnp.zeros(length, jnp.int32) for field in range(FIELDS)}


def _table(fields: dict[int, jax.Array]) -> jax.Array:
    return jnp.stack([fields[field].astype(jnp.int32) for field in range(FIELDS)], axis=1)
