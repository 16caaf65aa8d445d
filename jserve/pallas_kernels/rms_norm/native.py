"""RMS norms on CPU in C++: see `native/rms_norm.cc`."""

import jax
import jax.numpy as jnp
import numpy as np


def rms_norm(x: jax.Array, weight: jax.Array, *, eps: float, offset: float) -> jax.Array:
    """See `dispatch`."""
    call = jax.ffi.ffi_call("jserve_rms_norm", jax.ShapeDtypeStruct(x.shape, jnp.float32))
    factor = weight.astype(jnp.float32)
    normed = call(x.astype(jnp.float32), factor, eps=np.float32(eps), offset=np.float32(offset))
    return normed.astype(x.dtype)
