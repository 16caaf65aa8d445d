"""Calls of the C++ kernels of this folder; the ops' dispatch has their contracts.

The matmuls of several weights are one call, so that threads meet once. Activations go in, and
results come out, in float32.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jserve.pallas_kernels.matmul.panels import PanelMatrix
from jserve.pallas_kernels.quantized_matmul.matrix import QuantizedMatrix
from jserve.pallas_kernels.ragged_paged_attention.batch import RaggedBatch


def matmul(
    x: jax.Array, weights: Sequence[PanelMatrix], num_rows: jax.Array | None
) -> tuple[jax.Array, ...]:
    call = jax.ffi.ffi_call("jserve_matmul", [_rows(x, weight.out_dim) for weight in weights])
    values = (weight.values for weight in weights)
    return tuple(call(x.astype(jnp.float32), _count(x, num_rows), *values))


def quantized_matmul(
    x: jax.Array, weights: Sequence[QuantizedMatrix], num_rows: jax.Array | None
) -> tuple[jax.Array, ...]:
    shapes = [_rows(x, weight.shape[0]) for weight in weights]
    call = jax.ffi.ffi_call("jserve_quantized_matmul", shapes)
    parts = [part for weight in weights for part in weight]
    return tuple(call(x.astype(jnp.float32), _count(x, num_rows), *parts))


def grouped_matmul(
    x: jax.Array, weights: Sequence[PanelMatrix], group_sizes: jax.Array
) -> tuple[jax.Array, ...]:
    shapes = [_rows(x, weight.out_dim) for weight in weights]
    call = jax.ffi.ffi_call("jserve_grouped_matmul", shapes)
    values = (weight.values for weight in weights)
    return tuple(call(x.astype(jnp.float32), group_sizes.astype(jnp.int32), *values))


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


def rms_norm(x: jax.Array, weight: jax.Array, *, eps: float, offset: float) -> jax.Array:
    call = jax.ffi.ffi_call("jserve_rms_norm", jax.ShapeDtypeStruct(x.shape, jnp.float32))
    floats = (part.astype(jnp.float32) for part in (x, weight))
    return call(*floats, eps=np.float32(eps), offset=np.float32(offset)).astype(x.dtype)


def rotary(
    q: jax.Array,
    k: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    *,
    q_scale: float,
    num_tokens: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    shapes = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (q, k)]
    call = jax.ffi.ffi_call("jserve_rotary", shapes)
    floats = (x.astype(jnp.float32) for x in (q, k, cos, sin))
    rotated_q, rotated_k = call(*floats, _count(q, num_tokens), q_scale=np.float32(q_scale))
    return rotated_q.astype(q.dtype), rotated_k.astype(k.dtype)


def gated_activation(
    gate: jax.Array, up: jax.Array, num_tokens: jax.Array | None, *, is_silu: bool
) -> jax.Array:
    shape = jax.ShapeDtypeStruct(gate.shape, jnp.float32)
    call = jax.ffi.ffi_call("jserve_gated_activation", shape)
    floats = (x.astype(jnp.float32) for x in (gate, up))
    return call(*floats, _count(gate, num_tokens), is_silu=is_silu).astype(gate.dtype)


def _rows(x: jax.Array, out_dim: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((x.shape[0], out_dim), jnp.float32)


def _count(x: jax.Array, live: jax.Array | None) -> jax.Array:
    """Number of rows of `x` that mean something: all rows unless `live` is given."""
    return jnp.int32(x.shape[0]) if live is None else live
