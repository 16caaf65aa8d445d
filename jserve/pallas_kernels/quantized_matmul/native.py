"""Quantized products on CPU in C++: see `native/quantized_matmul.cc`."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jserve.pallas_kernels.quantized_matmul.matrix import QuantizedMatrix


def quantized_matmul(
    x: jax.Array, weights: Sequence[QuantizedMatrix], num_rows: jax.Array | None
) -> tuple[jax.Array, ...]:
    """See `dispatch`. All products in one call, so that threads meet once."""
    rows = jnp.int32(x.shape[0]) if num_rows is None else num_rows
    shapes = [
        jax.ShapeDtypeStruct((x.shape[0], weight.shape[0]), jnp.float32) for weight in weights
    ]
    call = jax.ffi.ffi_call("jserve_quantized_matmul", shapes)
    parts = [part for weight in weights for part in weight]
    return tuple(call(x.astype(jnp.float32), rows, *parts))
