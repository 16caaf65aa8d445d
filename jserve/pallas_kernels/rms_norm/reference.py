"""What an RMS norm means, in plain jnp."""

import jax
import jax.numpy as jnp
from jax import lax


def rms_norm(x: jax.Array, weight: jax.Array, *, eps: float, offset: float) -> jax.Array:
    """See `dispatch`."""
    wide = x.astype(jnp.float32)
    return scaled(wide, jnp.mean(wide * wide, -1, keepdims=True), weight, eps, offset, x.dtype)


def scaled(
    wide: jax.Array,
    mean_square: jax.Array,
    weight: jax.Array,
    eps: float,
    offset: float,
    dtype: jnp.dtype,
) -> jax.Array:
    """The rows `wide` divided by their root mean square and weighted."""
    factor = weight.astype(jnp.float32) + offset
    factor = factor.reshape((1,) * (wide.ndim - 1) + (-1,))
    return (wide * lax.rsqrt(mean_square + eps) * factor).astype(dtype)
