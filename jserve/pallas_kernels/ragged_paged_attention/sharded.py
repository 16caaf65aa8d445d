"""Ragged paged attention over devices: each device attends with its own heads."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Float, Float32

from jserve.pallas_kernels.backend import Backend
from jserve.pallas_kernels.ragged_paged_attention.batch import RaggedBatch
from jserve.pallas_kernels.ragged_paged_attention.dispatch import ragged_paged_attention


def sharded_attention(
    q: Float[jax.Array, "tokens q_heads head_dim"],
    k: Float[jax.Array, "tokens kv_heads head_dim"],
    v: Float[jax.Array, "tokens kv_heads head_dim"],
    pages: Float[jax.Array, "pages 2 stored_kv_heads page_size head_dim"],
    batch: RaggedBatch,
    *,
    window: int,
    prompts: bool,
    backend: Backend,
    mesh: Mesh,
    kv_scales: Float32[jax.Array, "2 stored_kv_heads"] | None = None,
) -> tuple[
    Float[jax.Array, "tokens q_heads head_dim"],
    Float[jax.Array, "pages 2 stored_kv_heads page_size head_dim"],
]:
    """Runs `ragged_paged_attention` with heads split over the devices of `mesh`.

    If the model has fewer KV heads than there are devices, the pages hold one for each device:
    neighbours that share a head have copies of it.
    """

    def attend(
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        pages: jax.Array,
        batch: RaggedBatch,
        kv_scales: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array]:
        return ragged_paged_attention(
            *(q, k, v, pages, batch),
            window=window,
            prompts=prompts,
            backend=backend,
            kv_scales=kv_scales,
        )

    if mesh.size == 1:
        return attend(q, k, v, pages, batch, kv_scales)
    copies = pages.shape[2] // k.shape[1]
    if copies > 1:
        k, v = jnp.repeat(k, copies, axis=1), jnp.repeat(v, copies, axis=1)
    heads = PartitionSpec(None, mesh.axis_names, None)
    shares = PartitionSpec(None, None, mesh.axis_names, None, None)
    # The batch is the same everywhere, so the kernel runs as on one device; nothing is exchanged.
    split = jax.shard_map(
        attend,
        mesh=mesh,
        in_specs=(
            heads,
            heads,
            heads,
            shares,
            PartitionSpec(),
            PartitionSpec(None, mesh.axis_names),
        ),
        out_specs=(heads, shares),
        check_vma=False,
    )
    return split(q, k, v, pages, batch, kv_scales)
