"""The definition of a grouped matmul, in plain jnp: all rows by all experts, then a choice."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jserve.pallas_kernels.matmul.reference import dot


def grouped_matmul(
    x: jax.Array, weights: Sequence[jax.Array], group_sizes: jax.Array
) -> tuple[jax.Array, ...]:
    """Implements `dispatch.grouped_matmul`; rows after the last group are zero."""
    ends = jnp.cumsum(group_sizes)
    row = jnp.arange(x.shape[0])[None, :]
    belongs = (row >= (ends - group_sizes)[:, None]) & (row < ends[:, None])  # [experts, rows]

    def multiply(weight: jax.Array) -> jax.Array:
        if not jnp.issubdtype(weight.dtype, jnp.floating):
            weight = weight.astype(x.dtype)  # codes
        everything = jax.vmap(dot, in_axes=(None, 0))(x, weight)
        return jnp.sum(jnp.where(belongs[:, :, None], everything, 0.0), axis=0)

    return tuple(multiply(weight) for weight in weights)
