"""RMS norms by XLA, summed so that a row's bits depend on nothing but the row.

XLA's CPU backend hands a reduction to YNNPACK only above some 4,000 elements, and below it sums
in another order, so `jnp.mean` of a row depends on how many rows there are. A dot with ones does
not; two columns, because one would make it a matrix-vector product.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jserve.pallas_kernels.matmul import cpu as matmul
from jserve.pallas_kernels.rms_norm.reference import scaled


def rms_norm(x: jax.Array, weight: jax.Array, *, eps: float, offset: float) -> jax.Array:
    """See `dispatch`."""
    wide = x.astype(jnp.float32)
    total = lax.platform_dependent(wide * wide, cpu=_sum_by_dot, default=_sum_by_reduction)
    return scaled(wide, total / x.shape[-1], weight, eps, offset, x.dtype)


def _sum_by_dot(x: jax.Array) -> jax.Array:
    dim = x.shape[-1]
    (totals,) = matmul.matmul(x.reshape(-1, dim), (jnp.ones((2, dim), x.dtype),))
    return totals[:, :1].reshape(*x.shape[:-1], 1)


def _sum_by_reduction(x: jax.Array) -> jax.Array:
    return jnp.sum(x, axis=-1, keepdims=True)
