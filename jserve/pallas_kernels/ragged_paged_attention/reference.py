"""The definition of ragged paged attention, in plain jnp; reads each row's whole page table."""

import jax
import jax.numpy as jnp

from jserve.pallas_kernels.ragged_paged_attention.batch import RaggedBatch


def write_kv(pages: jax.Array, k: jax.Array, v: jax.Array, batch: RaggedBatch) -> jax.Array:
    """Puts each token's K and V into its page; in place when `pages` is donated."""
    new = jnp.stack([k, v], axis=1).astype(pages.dtype)  # [tokens, K|V, kv_heads, head_dim]
    return pages.at[batch.write_pages, :, :, batch.write_offsets].set(new)


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
    del prompts  # one routine for all rows
    pages = write_kv(pages, k, v, batch)
    tokens, q_heads, head_dim = q.shape
    _, _, kv_heads, page_size, _ = pages.shape
    rows, pages_per_row = batch.page_table.shape
    context = pages_per_row * page_size

    index = jnp.arange(tokens)
    offset = index[None, :] - batch.q_starts[:, None]
    owned = (offset >= 0) & (offset < batch.q_lens[:, None])  # [rows, tokens]
    row = jnp.argmax(owned, axis=0)
    position = batch.kv_lens[row] - batch.q_lens[row] + index - batch.q_starts[row]

    kv = pages[batch.page_table]  # [rows, pages, K|V, kv_heads, page_size, head_dim]
    kv = jnp.moveaxis(kv, 2, 0).swapaxes(3, 4).reshape(2, rows, context, kv_heads, head_dim)
    place = jnp.arange(context)[None, :]
    age = position[:, None] - place
    seen = (age >= 0) & owned.any(axis=0)[:, None]  # [tokens, context]
    if window:
        seen &= age < window
    # Memory that no token sees may hold anything, NaN included.
    written = (place < batch.kv_lens[:, None])[None, :, :, None, None]
    keys, values = jnp.where(written, kv, 0).astype(jnp.float32)[:, row]

    grouped = q.astype(jnp.float32).reshape(tokens, kv_heads, q_heads // kv_heads, head_dim)
    scores = jnp.einsum("tkgd,tckd->tkgc", grouped, keys)
    scores = jnp.where(seen[:, None, None, :], scores, -jnp.inf)
    peak = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - jnp.where(jnp.isfinite(peak), peak, 0.0))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights / jnp.where(total > 0, total, 1.0)
    out = jnp.einsum("tkgc,tckd->tkgd", weights, values)
    return out.reshape(q.shape).astype(q.dtype), pages
