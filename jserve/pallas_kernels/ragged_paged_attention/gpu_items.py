"""Sizes of the GPU kernel, and its lists of items, made by a few XLA operations.

The lists depend on the batch alone, so that XLA computes them once for all layers.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Int

from jserve.pallas_kernels.ragged_paged_attention.batch import RaggedBatch

TILE = 8  # rows of tiled shared memory that a copy moves together, from a multiple of it on
ROWS = 64  # queries · grouped heads of a warpgroup's wgmma
BLANK = 32  # columns of zeros, for outputs of tokens that belong to no row

# Columns of the table of items.
ROW, TOKEN, COUNT, POSITION, START, KV_LEN, FIRST, END, QUERIES, NEW = range(10)
FIELDS = 10


@dataclass(frozen=True, slots=True)
class Shape:
    """Static sizes of a kernel."""

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
    columns: int  # columns of an output that are written at a time
    wide_columns: int  # columns of a float32 partial output that are written at a time
    writes: int  # tokens whose K or V is copied to pages at once
    blocks: int  # thread blocks of the launch
    kv_dtype: jnp.dtype

    @property
    def widens(self) -> bool:
        """Whether K and V are widened for the tensor cores."""
        return self.kv_dtype.itemsize == 1

    @property
    def dtype(self) -> jnp.dtype:
        """Operand type of the tensor cores; float16 holds every float8_e4m3fn exactly."""
        return jnp.dtype(jnp.float16 if self.widens else jnp.bfloat16)

    @property
    def lines(self) -> int:
        """Columns of K and V that stand together in shared memory: 128 bytes, or all of them."""
        return min(128 // self.kv_dtype.itemsize, self.head_dim)

    @property
    def tile(self) -> int:
        """Query tokens of a warpgroup."""
        return ROWS // self.group

    @property
    def tile_rows(self) -> int:
        """Rows from one tile of a row's queries to the next."""
        return up_to(self.tile * self.group, TILE)

    @property
    def pieces(self) -> int:
        """Copies that fill K or V of a stage: one for each page."""
        return max(self.block // self.page_size, 1)

    @property
    def max_splits(self) -> int:
        """Most splits of a decode row."""
        return -(-self.pages_per_row * self.page_size // self.split)

    @property
    def query_rows(self) -> int:
        """Rows of the queries that a decode warpgroup loads: whole tiles of shared memory."""
        return up_to(self.group, TILE)


def up_to(size: Any, multiple: int) -> Any:
    """Rounds a number, or an array of numbers, up to a multiple."""
    return (size + multiple - 1) // multiple * multiple


class Work(NamedTuple):
    """Lists of items; each listed item is one item for every KV head."""

    prompts: Int[jax.Array, "prompt_items fields"]
    splits: Int[jax.Array, "split_items fields"]  # COUNT is the number of the row's splits
    counts: Int[
        jax.Array, "4"
    ]  # [prompt items, split items, visits, visits that take two splits], over all KV heads
    row_splits: Int[jax.Array, "rows 4"]  # first item, number, token, 0
    queries: Int[jax.Array, " query_rows"]  # token · group + head in its group, for every row
    new: Int[jax.Array, " new_rows"] | None  # for prompts: token whose K and V stand in a row


def _spread(counts: jax.Array, length: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Row and place in the row of each item, and the first item of each row."""
    ends = jnp.cumsum(counts)
    index = jnp.arange(length, dtype=jnp.int32)
    row = jnp.searchsorted(ends, index, side="right", method="scan_unrolled").astype(jnp.int32)
    row = jnp.minimum(row, counts.shape[0] - 1)
    starts = (ends - counts).astype(jnp.int32)
    return row, index - starts[row], starts


def make_work(batch: RaggedBatch, shape: Shape, *, prompts: bool) -> Work:
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
    query_base, queries = _query_rows(batch, shape, live, prompts=prompts)
    splits |= {QUERIES: query_base[row], NEW: 0 * row}
    row_splits = jnp.stack([starts, number, batch.q_starts, jnp.zeros_like(starts)], axis=1)
    tiles, num_tiles, new = _no_items(1), jnp.int32(0), None
    if prompts:
        prompt = live & (index >= batch.num_decode) & (index < batch.num_rows)
        new_base, new = _new_rows(batch, shape, prompt)
        tiles, num_tiles = _tiles(batch, shape, prompt, query_base, new_base)
    counts = count_visits(
        num_tiles * shape.kv_heads, jnp.sum(number) * shape.kv_heads, shape.blocks
    )
    return Work(_table(tiles), _table(splits), counts, row_splits, queries, new)


def count_visits(prompts: jax.Array, splits: jax.Array, blocks: int) -> jax.Array:
    """Counts for `Work`. A visit takes two splits, or one if there are enough thread blocks."""
    visits = jnp.minimum(splits, jnp.maximum((splits + 1) // 2, blocks - prompts))
    return jnp.stack([prompts, splits, visits, splits - visits]).astype(jnp.int32)


def _query_rows(
    batch: RaggedBatch, shape: Shape, live: jax.Array, *, prompts: bool
) -> tuple[jax.Array, jax.Array]:
    """First place of each row's queries, and the query in each place.

    Rows and their tiles begin at multiples of `TILE`. Places between and after them are read with
    them, and their results are not stored.
    """
    rows, tokens = shape.rows, shape.tokens
    whole, rest = batch.q_lens // shape.tile, batch.q_lens % shape.tile
    sizes = whole * shape.tile_rows + up_to(rest * shape.group, TILE)
    most = rows * shape.query_rows
    if prompts:
        most = -(-tokens * shape.tile_rows // shape.tile) + (TILE - 1) * min(rows, tokens)
    octets = jnp.where(live, sizes, 0).astype(jnp.int32) // TILE
    row, place, starts = _spread(octets, up_to(most, TILE) // TILE + 2 * ROWS // TILE)
    inside = _octet(place)
    tile, inside = inside // shape.tile_rows, inside % shape.tile_rows
    token = batch.q_starts[row][:, None] + tile * shape.tile + inside // shape.group
    token = jnp.clip(token, 0, tokens - 1)
    return TILE * starts, (token * shape.group + inside % shape.group).reshape(-1)


def _octet(place: jax.Array) -> jax.Array:
    """Expands [n] tiles of 8 rows to the rows of each: [n, 8]."""
    return TILE * place[:, None] + jnp.arange(TILE, dtype=jnp.int32)[None, :]


def _new_rows(batch: RaggedBatch, shape: Shape, prompt: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Place of each prompt row's position 0 among new K and V, and the token in each place.

    Position p of a row stands at a place equal to p modulo `TILE`, so that blocks begin at
    multiples of it. One block before and one after cover reads beyond a row's chunk.
    """
    start = batch.kv_lens - batch.q_lens
    before = start % TILE
    octets = jnp.where(prompt, up_to(before + batch.q_lens, TILE), 0).astype(jnp.int32) // TILE
    most = shape.tokens + 2 * (TILE - 1) * min(shape.rows, shape.tokens)
    row, place, starts = _spread(octets, up_to(most, TILE) // TILE)
    token = (batch.q_starts - before)[row][:, None] + _octet(place)
    token = jnp.clip(token, 0, shape.tokens - 1).reshape(-1)
    around = (shape.block, shape.block)
    return shape.block + TILE * starts - (start - before), jnp.pad(token, around)


def _tiles(
    batch: RaggedBatch,
    shape: Shape,
    prompt: jax.Array,
    query_base: jax.Array,
    new_base: jax.Array,
) -> tuple[dict[int, jax.Array], jax.Array]:
    """Lists pairs of tiles of prompt rows, a tile for each compute warpgroup."""
    size = 2 * shape.tile
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
        QUERIES: query_base[row] + offset // shape.tile * shape.tile_rows,
        NEW: new_base[row],
    }
    return items, jnp.sum(number)


def _no_items(length: int) -> dict[int, jax.Array]:
    return {field: jnp.zeros(length, jnp.int32) for field in range(FIELDS)}


def _table(fields: dict[int, jax.Array]) -> jax.Array:
    return jnp.stack([fields[field].astype(jnp.int32) for field in range(FIELDS)], axis=1)
