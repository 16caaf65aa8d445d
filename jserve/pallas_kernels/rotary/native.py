"""Rotation on CPU in C++: see `native/rotary.cc`.

XLA's fusions would make the cosines and sines anew in every layer.
"""

import jax
import jax.numpy as jnp
import numpy as np


def rotary(
    q: jax.Array,
    k: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    *,
    q_scale: float,
    num_tokens: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """See `dispatch`."""
    count = jnp.int32(q.shape[0]) if num_tokens is None else num_tokens
    shapes = [jax.ShapeDtypeStruct(x.shape, jnp.float32) for x in (q, k)]
    call = jax.ffi.ffi_call("jserve_rotary", shapes)
    floats = (x.astype(jnp.float32) for x in (q, k, cos, sin))
    turned_q, turned_k = call(*floats, count, q_scale=np.float32(q_scale))
    return turned_q.astype(q.dtype), turned_k.astype(k.dtype)
