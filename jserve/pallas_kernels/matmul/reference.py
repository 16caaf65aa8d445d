"""The definition of a matmul, in plain jnp."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax


def dot(x: jax.Array, weight: jax.Array) -> jax.Array:
    """Returns x · weightᵀ in float32."""
    return lax.dot_general(
        x,
        weight,
        (((1,), (1,)), ((), ())),
        # Float32 means float32, on the matrix units of accelerators too.
        precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def matmul(
    x: jax.Array, weights: Sequence[jax.Array], num_rows: jax.Array | None = None
) -> tuple[jax.Array, ...]:
    del num_rows
    return tuple(dot(x, weight) for weight in weights)
