"""The ragged batch that attention runs over, with the addresses of its K and V."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Int

NULL_PAGE = 0  # padding writes here; nothing reads it


class RaggedBatch(NamedTuple):
    """Tokens of several sequences, row after row.

    Rows before `num_decode` hold at most one token each and take the decode routine; the rows
    after them, up to `num_rows`, hold chunks of prompts. A row whose length is 0 is idle.
    Positions are absolute; the query tokens of a row are the last ones of its `kv_lens`.
    """

    page_table: Int[jax.Array, "rows pages_per_row"]  # page ids in order; NULL_PAGE past the end
    kv_lens: Int[jax.Array, " rows"]  # tokens in KV memory once this batch is written
    q_starts: Int[jax.Array, " rows"]  # ragged index of a row's first token
    q_lens: Int[jax.Array, " rows"]
    num_decode: Int[jax.Array, ""]
    num_rows: Int[jax.Array, ""]
    write_pages: Int[jax.Array, " tokens"]  # page that takes the token's K and V
    write_offsets: Int[jax.Array, " tokens"]  # place of the token in that page


def make_ragged_batch(
    page_table: Int[jax.Array, "rows pages_per_row"],
    kv_lens: Int[jax.Array, " rows"],
    q_starts: Int[jax.Array, " rows"],
    q_lens: Int[jax.Array, " rows"],
    num_decode: Int[jax.Array, ""],
    num_rows: Int[jax.Array, ""],
    token_rows: Int[jax.Array, " tokens"],
    positions: Int[jax.Array, " tokens"],
    live: Bool[jax.Array, " tokens"],
    *,
    page_size: int,
) -> RaggedBatch:
    """Adds the write addresses of every token; tokens that are not live go to the null page."""
    page_index = jnp.where(live, positions // page_size, 0)
    pages = page_table[token_rows, page_index]
    return RaggedBatch(
        page_table,
        kv_lens,
        q_starts,
        q_lens,
        num_decode,
        num_rows,
        jnp.where(live, pages, NULL_PAGE),
        positions % page_size,
    )
