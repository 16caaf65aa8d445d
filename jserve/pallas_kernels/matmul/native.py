"""Matrix products on CPU in C++: see `native/matmul.cc`."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def matmul(x: jax.Array, weights: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """See `dispatch`. All products in one call, so that threads meet once."""
    shapes = [jax.ShapeDtypeStruct((x.shape[0], len(weight)), jnp.float32) for weight in weights]
    return tuple(jax.ffi.ffi_call("jserve_matmul", shapes)(x.astype(jnp.float32), *weights))
