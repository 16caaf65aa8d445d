"""Matrix products on CPU in C++: see `native/matmul.cc`."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jserve.pallas_kernels.matmul.panels import PanelMatrix


def matmul(
    x: jax.Array, weights: Sequence[PanelMatrix], num_rows: jax.Array | None
) -> tuple[jax.Array, ...]:
    """See `dispatch`. All products in one call, so that threads meet once."""
    rows = jnp.int32(x.shape[0]) if num_rows is None else num_rows
    shapes = [jax.ShapeDtypeStruct((x.shape[0], weight.out_dim), jnp.float32) for weight in weights]
    call = jax.ffi.ffi_call("jserve_matmul", shapes)
    return tuple(call(x.astype(jnp.float32), rows, *(weight.values for weight in weights)))
