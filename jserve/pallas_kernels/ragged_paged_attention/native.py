"""Ragged paged attention on CPU in C++: see `native/attention.cc`."""

import jax
import jax.numpy as jnp
import numpy as np

from jserve.pallas_kernels.ragged_paged_attention.batch import RaggedBatch


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
    """See `dispatch`."""
    del prompts  # one routine for all rows
    call = jax.ffi.ffi_call(
        "jserve_ragged_paged_attention",
        (
            jax.ShapeDtypeStruct(q.shape, jnp.float32),
            jax.ShapeDtypeStruct(pages.shape, pages.dtype),
        ),
        input_output_aliases={3: 1},
    )
    out, pages = call(
        q.astype(jnp.float32),
        k.astype(jnp.float32),
        v.astype(jnp.float32),
        pages,
        batch.page_table,
        batch.kv_lens,
        batch.q_starts,
        batch.q_lens,
        batch.num_rows,
        batch.write_pages,
        batch.write_offsets,
        window=np.int64(window),
    )
    return out.astype(q.dtype), pages
