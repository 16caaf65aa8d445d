"""Sizes and scalars of the TPU kernel, and the order of its items."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jserve.pallas_kernels.ragged_paged_attention.batch import RaggedBatch
from jserve.pallas_kernels.ragged_paged_attention.tpu_blocks import Blocks

LANES = 128
SUBLANES = 8  # rows of a 32-bit tile; narrower types have more
_SMEM_INTS = 192 * 1024  # three quarters of the 1 MiB of every generation

Ref = Any  # a Pallas reference


@dataclass(frozen=True, slots=True)
class Shape:
    """Static sizes of a kernel."""

    rows: int
    pages_per_row: int
    page_size: int
    kv_heads: int
    group: int  # query heads of a KV head
    head_dim: int
    window: int
    block: int  # tokens of K and V in an item
    tile: int  # query tokens of a prompt's item
    strip: int  # tokens of the smallest aligned slice of a page
    query_strip: int  # tokens of the smallest aligned slice of queries
    lead: int  # unused tokens before the first one of the new K and V of prompts
    transposed: bool  # pages hold [head_dim, tokens], not [tokens, head_dim]
    precision: lax.Precision

    @property
    def token_axis(self) -> int:
        """Axis of a plane that holds tokens."""
        return 1 if self.transposed else 0

    def plane(self, tokens: int) -> tuple[int, int]:
        """Shape of K or V of one head in a page or block."""
        return (self.head_dim, tokens) if self.transposed else (tokens, self.head_dim)

    def span(self, start: jax.Array | int, tokens: int) -> tuple[Any, Any]:
        """Index of `size` tokens of a plane."""
        here = pl.ds(start, tokens)
        return (slice(None), here) if self.transposed else (here, slice(None))

    @property
    def fresh_strip(self) -> int:
        """Tokens of the smallest aligned slice of the new K and V, in float32."""
        return LANES if self.transposed else SUBLANES

    @property
    def lanes(self) -> int:
        """Lanes of a head that stand in one tile."""
        return min(LANES, self.head_dim)

    @property
    def columns(self) -> int:
        """Tiles of lanes that a head spans."""
        return self.head_dim // self.lanes

    @property
    def decode_group(self) -> int:
        """Query heads of a KV head, padded to a whole tile."""
        return -(-self.group // SUBLANES) * SUBLANES


def _sublanes(dtype: jnp.dtype) -> int:
    """Rows of the smallest tile that holds a dtype without padding."""
    return SUBLANES * 4 // jnp.dtype(dtype).itemsize


def make_shape(
    q: jax.Array, pages: jax.Array, batch: RaggedBatch, window: int, blocks: Blocks
) -> Shape:
    """Chooses sizes for these arguments. Raises ValueError for arguments the kernel cannot take."""
    tokens, q_heads, head_dim = q.shape
    _, _, kv_heads, page_size, _ = pages.shape
    rows, pages_per_row = batch.page_table.shape
    if rows * (pages_per_row + 3) > _SMEM_INTS:
        raise ValueError(
            f"a page table of {rows} rows of {pages_per_row} pages is too large for scalar "
            f"memory, which holds {_SMEM_INTS} numbers; take larger pages or fewer buffers"
        )
    if page_size % SUBLANES:
        raise ValueError(f"page_size {page_size} is no multiple of {SUBLANES}")
    if head_dim > LANES and head_dim % LANES:
        raise ValueError(f"head_dim {head_dim} is above {LANES} and no multiple of it")
    group = q_heads // kv_heads
    query_strip = _sublanes(q.dtype)
    # XLA keeps such pages with tokens along the lanes, which wastes none; so does the kernel.
    transposed = head_dim < LANES and page_size % LANES == 0
    tile = blocks.query_tokens(group, query_strip)
    while tile // 2 >= max(query_strip, tokens):
        tile //= 2
    return Shape(
        rows=rows,
        pages_per_row=pages_per_row,
        page_size=page_size,
        kv_heads=kv_heads,
        group=group,
        head_dim=head_dim,
        window=window,
        block=blocks.kv_tokens(page_size, kv_heads, head_dim, pages.dtype.itemsize),
        tile=tile,
        strip=min(LANES if transposed else _sublanes(pages.dtype), page_size),
        query_strip=query_strip,
        lead=page_size,
        transposed=transposed,
        precision=lax.Precision.HIGHEST if q.dtype == jnp.float32 else lax.Precision.DEFAULT,
    )


class Rows(NamedTuple):
    """Scalars in SMEM."""

    table: Ref  # [rows · pages_per_row]
    kv_lens: Ref  # [rows]
    q_starts: Ref
    q_lens: Ref
    counts: Ref  # num_decode, num_rows


class Item(NamedTuple):
    """A block of KV for a tile of queries, as scalars."""

    row: jax.Array
    tile: jax.Array  # index of the tile in the row
    tiles: jax.Array
    token: jax.Array  # ragged index of the tile's first token
    origin: jax.Array  # position of that token if it were of this row
    first: jax.Array  # tokens [first, end) of the tile belong to the row
    end: jax.Array
    page: jax.Array  # the tile sees pages [page, end_page)
    end_page: jax.Array
    block: jax.Array
    first_block: jax.Array
    last_block: jax.Array

    @property
    def last(self) -> jax.Array:
        """Position of the row's last token in this tile."""
        return self.origin + self.end - 1


def next_live(rows: Rows, row: jax.Array, end: jax.Array) -> jax.Array:
    """Finds the first row from `row` on that has tokens, or `end`."""
    return lax.while_loop(
        lambda r: (r < end) & (rows.q_lens[jnp.minimum(r, end - 1)] == 0), lambda r: r + 1, row
    )


def first_item(rows: Rows, shape: Shape, row: jax.Array, tile: jax.Array, *, decode: bool) -> Item:
    """Makes the first item of a tile; the item of a row past the end must not be used."""
    row_in = jnp.minimum(row, shape.rows - 1)
    q_start, q_len, kv_len = rows.q_starts[row_in], rows.q_lens[row_in], rows.kv_lens[row_in]
    if decode:
        tiles, token, origin = jnp.int32(1), q_start, kv_len - 1
        first, end = jnp.int32(0), jnp.int32(1)
    else:
        aligned = q_start // shape.query_strip * shape.query_strip
        tiles = pl.cdiv(q_start + q_len - aligned, shape.tile)
        token = aligned + tile * shape.tile
        origin = kv_len - q_len + token - q_start
        first = jnp.maximum(q_start - token, 0)
        end = jnp.minimum(q_start + q_len - token, shape.tile)
    last = origin + end - 1
    seen = jnp.maximum(origin + first - shape.window + 1, 0) if shape.window else jnp.int32(0)
    return Item(
        row=row,
        tile=tile,
        tiles=tiles,
        token=token,
        origin=origin,
        first=first,
        end=end,
        page=seen // shape.page_size,
        end_page=last // shape.page_size + 1,
        block=seen // shape.block,
        first_block=seen // shape.block,
        last_block=last // shape.block,
    )


def advance(rows: Rows, shape: Shape, item: Item, end: jax.Array, *, decode: bool) -> Item:
    """Makes the item after this one; its row is `end` if there is none."""

    def next_tile() -> Item:
        ends = item.tile + 1 == item.tiles
        row = next_live(rows, jnp.where(ends, item.row + 1, item.row), end)
        return first_item(rows, shape, row, jnp.where(ends, 0, item.tile + 1), decode=decode)

    return lax.cond(
        item.block == item.last_block, next_tile, lambda: item._replace(block=item.block + 1)
    )
