"""Grouped products on CPU in C++: see `native/grouped_matmul.cc`."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jserve.pallas_kernels.matmul.panels import PanelMatrix


def grouped_matmul(
    x: jax.Array, weights: Sequence[PanelMatrix], group_sizes: jax.Array
) -> tuple[jax.Array, ...]:
    """See `dispatch`. All products in one call, so that threads meet once."""
    shapes = [jax.ShapeDtypeStruct((x.shape[0], weight.out_dim), jnp.float32) for weight in weights]
    call = jax.ffi.ffi_call("jserve_grouped_matmul", shapes)
    values = (weight.values for weight in weights)
    return tuple(call(x.astype(jnp.float32), group_sizes.astype(jnp.int32), *values))
