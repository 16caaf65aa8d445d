"""Ragged paged attention on CPU: XLA loops whose trip counts follow the real context lengths.

Each row is walked alone, over KV blocks at fixed absolute positions, with a running softmax:

    row r:   block 0 ── block 1 ── … ── block of the row's last token
             gather pages → q·k → rescale → p·v

so the result of a row is bitwise independent of its neighbours, its place in the batch and how
its prompt was cut into chunks. A decode row has one query; a prompt chunk is cut into tiles of
`_TILE` queries that share the loaded block. Blocks that a sliding window cannot see are skipped.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jserve.pallas_kernels.matmul.cpu import einsum
from jserve.pallas_kernels.ragged_paged_attention.batch import RaggedBatch
from jserve.pallas_kernels.ragged_paged_attention.reference import write_kv

_BLOCK = 128  # KV tokens gathered at a time; a multiple of the page size
_TILE = 32  # queries of a prompt tile
_MASKED = -1e30  # finite, so that a fully masked block leaves the running softmax unchanged


class _Softmax(NamedTuple):
    """Running softmax of one tile of queries: [kv_heads, queries, …]."""

    peak: jax.Array
    total: jax.Array
    out: jax.Array


def _load_block(pages: jax.Array, table: jax.Array, block: jax.Array, kv_len: jax.Array):
    """Loads K and V of one block, [kv_heads, block, head_dim] each; V past the end is zero."""
    _, _, kv_heads, page_size, head_dim = pages.shape
    num_pages = max(_BLOCK // page_size, 1)
    ids = lax.dynamic_slice(table, (block * num_pages,), (num_pages,))

    def load(part: int) -> jax.Array:  # one gather, fused with the transposition
        found = pages.at[ids, part].get(mode="promise_in_bounds")
        return found.swapaxes(0, 1).reshape(kv_heads, num_pages * page_size, head_dim)

    keys, values = load(0), load(1)
    position = block * (num_pages * page_size) + jnp.arange(num_pages * page_size)
    # A weight of zero does not silence a NaN in memory that was never written.
    return keys, jnp.where((position < kv_len)[None, :, None], values, 0), position


def _attend_tile(
    q: jax.Array,  # [kv_heads, queries, head_dim]
    q_positions: jax.Array,  # [queries]
    kv_len: jax.Array,
    table: jax.Array,  # [pages_per_row]
    pages: jax.Array,
    window: int,
) -> jax.Array:
    """Attends with one tile over its row's pages: [kv_heads, queries, head_dim] float32."""
    kv_heads, queries, head_dim = q.shape
    block_size = max(_BLOCK // pages.shape[3], 1) * pages.shape[3]

    def step(block: jax.Array, carry: _Softmax) -> _Softmax:
        keys, values, position = _load_block(pages, table, block, kv_len)
        scores = einsum("kqd,ktd->kqt", q, keys, q.dtype)
        age = q_positions[None, :, None] - position[None, None, :]  # [1, queries, block]
        seen = age >= 0
        if window:
            seen &= age < window
        scores = jnp.where(seen, scores, _MASKED)
        peak = jnp.maximum(carry.peak, jnp.max(scores, axis=-1))
        weights = jnp.where(seen, jnp.exp(scores - peak[:, :, None]), 0.0)
        fade = jnp.exp(carry.peak - peak)
        added = einsum("kqt,ktd->kqd", weights, values, q.dtype)
        return _Softmax(
            peak,
            carry.total * fade + jnp.sum(weights, axis=-1),
            carry.out * fade[:, :, None] + added,
        )

    # Queries past the end of the row see what the row's last query sees.
    first_seen = jnp.maximum(q_positions[0] - window + 1, 0) if window else jnp.int32(0)
    num_blocks = (kv_len + block_size - 1) // block_size
    last_block = jnp.minimum(num_blocks, q_positions[-1] // block_size + 1)
    empty = _Softmax(
        jnp.full((kv_heads, queries), _MASKED, jnp.float32),
        jnp.zeros((kv_heads, queries), jnp.float32),
        jnp.zeros((kv_heads, queries, head_dim), jnp.float32),
    )
    done = lax.fori_loop(first_seen // block_size, last_block, step, empty)
    return done.out / jnp.maximum(done.total, 1e-30)[:, :, None]


def _decode_rows(q: jax.Array, out: jax.Array, pages: jax.Array, batch: RaggedBatch, window: int):
    """Fills the outputs of the decode rows, one query each."""
    _, q_heads, head_dim = q.shape
    kv_heads = pages.shape[2]
    group = q_heads // kv_heads

    def row(r: jax.Array, out: jax.Array) -> jax.Array:
        token = batch.q_starts[r]
        tile = lax.dynamic_slice(q, (token, 0, 0), (1, q_heads, head_dim))
        tile = tile.reshape(kv_heads, group, head_dim)
        positions = jnp.broadcast_to(batch.kv_lens[r] - 1, (group,))
        done = _attend_tile(tile, positions, batch.kv_lens[r], batch.page_table[r], pages, window)
        done = done.reshape(1, q_heads, head_dim).astype(out.dtype)
        return lax.dynamic_update_slice(out, done, (token, 0, 0))

    return lax.fori_loop(0, batch.num_decode, row, out)


def _prompt_tiles(q: jax.Array, out: jax.Array, pages: jax.Array, batch: RaggedBatch, window: int):
    """Fills the outputs of the prompt rows, a tile of queries at a time."""
    tokens, q_heads, head_dim = q.shape
    kv_heads = pages.shape[2]
    group = q_heads // kv_heads
    # A tile may hang over the end of the ragged batch; its outputs there are cut off.
    q = jnp.pad(q, ((0, _TILE), (0, 0), (0, 0)))
    out = jnp.pad(out, ((0, _TILE), (0, 0), (0, 0)))
    lane = jnp.arange(_TILE)

    def tile(i: jax.Array, carry: tuple[jax.Array, jax.Array], r: jax.Array):
        out, start = carry
        token = batch.q_starts[r] + i * _TILE
        count = jnp.minimum(batch.q_lens[r] - i * _TILE, _TILE)
        queries = lax.dynamic_slice(q, (token, 0, 0), (_TILE, q_heads, head_dim))
        queries = queries.reshape(_TILE, kv_heads, group, head_dim).transpose(1, 2, 0, 3)
        position = start + i * _TILE + jnp.minimum(lane, count - 1)
        done = _attend_tile(
            queries.reshape(kv_heads, group * _TILE, head_dim),
            jnp.tile(position, group),
            batch.kv_lens[r],
            batch.page_table[r],
            pages,
            window,
        )
        done = done.reshape(kv_heads, group, _TILE, head_dim).transpose(2, 0, 1, 3)
        old = lax.dynamic_slice(out, (token, 0, 0), (_TILE, q_heads, head_dim))
        done = done.reshape(_TILE, q_heads, head_dim).astype(out.dtype)
        done = jnp.where((lane < count)[:, None, None], done, old)
        return lax.dynamic_update_slice(out, done, (token, 0, 0)), start

    def row(r: jax.Array, out: jax.Array) -> jax.Array:
        start = batch.kv_lens[r] - batch.q_lens[r]
        num_tiles = (batch.q_lens[r] + _TILE - 1) // _TILE
        return lax.fori_loop(0, num_tiles, functools.partial(tile, r=r), (out, start))[0]

    return lax.fori_loop(batch.num_decode, batch.num_rows, row, out)[:tokens]


def ragged_paged_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pages: jax.Array,
    batch: RaggedBatch,
    *,
    window: int,
    prompts: bool,
) -> tuple[jax.Array, jax.Array]:
    pages = write_kv(pages, k, v, batch)
    out = _decode_rows(q, jnp.zeros_like(q), pages, batch, window)
    if prompts:
        out = _prompt_tiles(q, out, pages, batch, window)
    return out, pages
