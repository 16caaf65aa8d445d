"""The one entry to ragged paged attention: contract, validation, choice of backend."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32

from jserve.pallas_kernels.backend import Backend, implementations
from jserve.pallas_kernels.native import calls
from jserve.pallas_kernels.ragged_paged_attention import cpu, reference, tpu
from jserve.pallas_kernels.ragged_paged_attention.batch import RaggedBatch


def _on_gpu(*args: Any, **kwargs: Any) -> tuple[jax.Array, jax.Array]:
    from jserve.pallas_kernels.ragged_paged_attention import gpu  # Mosaic imports in half a second

    return gpu.ragged_paged_attention(*args, **kwargs)


_IMPLEMENTATIONS = implementations(
    reference.ragged_paged_attention,
    cpu=cpu.ragged_paged_attention,
    native=calls.ragged_paged_attention,
    tpu=tpu.ragged_paged_attention,
    gpu=_on_gpu,
)


def kv_pages_shape(
    num_pages: int, page_size: int, kv_heads: int, head_dim: int
) -> tuple[int, int, int, int, int]:
    """Shape of one layer's pages with the null page: [pages, K|V, kv_heads, page_size, dim]."""
    return num_pages + 1, 2, kv_heads, page_size, head_dim


def ragged_paged_attention(
    q: Float[jax.Array, "tokens q_heads head_dim"],
    k: Float[jax.Array, "tokens kv_heads head_dim"],
    v: Float[jax.Array, "tokens kv_heads head_dim"],
    pages: Float[jax.Array, "pages 2 kv_heads page_size head_dim"],
    batch: RaggedBatch,
    *,
    window: int,
    prompts: bool,
    backend: Backend,
    kv_scales: Float32[jax.Array, "2 kv_heads"] | None = None,
) -> tuple[
    Float[jax.Array, "tokens q_heads head_dim"],
    Float[jax.Array, "pages 2 kv_heads page_size head_dim"],
]:
    """Writes K and V of every token into its page, then attends causally within each row.

    `q` is scaled already. A token at position p sees positions ≤ p of its own row, and with
    `window` > 0 only positions > p - window. Outputs of tokens that belong to no row mean nothing
    but are finite. `prompts=False` promises that every row is a decode row. `pages` is updated in
    place when its buffer is donated. Pages may be narrower than K and V, down to float8_e4m3fn,
    which clips values to ±448. 8-bit pages store K/k_scale and V/v_scale: the k scale is folded
    into q and the v scale into the output, and power-of-two scales make both exact.
    """
    q_heads, kv_heads = q.shape[1], k.shape[1]
    if q_heads % kv_heads:
        raise ValueError(f"q_heads {q_heads} is no multiple of kv_heads {kv_heads}")
    if pages.shape[1:3] != (2, kv_heads) or pages.shape[4] != q.shape[2]:
        raise ValueError(f"pages {pages.shape} do not hold {kv_heads} heads of {q.shape[2]}")
    if batch.page_table.dtype != jnp.int32:
        raise ValueError(f"page_table is {batch.page_table.dtype}, not int32")
    with jax.named_scope("ragged_paged_attention"):
        attend = _IMPLEMENTATIONS[backend_for_pages(backend, pages.dtype)]
        if pages.dtype.itemsize > 1:
            return attend(q, k, v, pages, batch, window=window, prompts=prompts)
        scales = jnp.ones((2, kv_heads), jnp.float32) if kv_scales is None else kv_scales
        k, v = (
            saturated(_scaled(x, jnp.divide, scale), pages.dtype)
            for x, scale in zip((k, v), scales, strict=True)
        )
        k_scales, v_scales = jnp.repeat(scales, q_heads // kv_heads, axis=1)
        q = _scaled(q, jnp.multiply, k_scales)
        out, pages = attend(q, k, v, pages, batch, window=window, prompts=prompts)
        return _scaled(out, jnp.multiply, v_scales), pages


def _scaled(
    x: jax.Array, change: Callable[[jax.Array, jax.Array], jax.Array], scales: jax.Array
) -> jax.Array:
    """Multiplies or divides each head by its scale."""
    return change(x.astype(jnp.float32), scales[None, :, None]).astype(x.dtype)


def backend_for_pages(backend: Backend, dtype: jnp.dtype) -> Backend:
    """The backend that attends over pages of this dtype: C++ cannot read 8-bit floats, XLA can."""
    narrow = jnp.dtype(dtype).itemsize == 1
    return Backend.CPU if backend is Backend.NATIVE and narrow else backend


def saturated(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Clips `x` to the range of an 8-bit float; a conversion would make larger values NaN."""
    limit = float(jnp.finfo(dtype).max)
    return jnp.clip(x, -limit, limit)
