"""Root-mean-square normalization of rows."""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

from jserve.pallas_kernels.backend import Backend, implementations
from jserve.pallas_kernels.matmul import cpu as matmul
from jserve.pallas_kernels.native import calls


def rms_norm(
    x: Float[jax.Array, "*rows dim"],
    weight: Float[jax.Array, " dim"],
    *,
    eps: float,
    offset: float,
    backend: Backend,
) -> Float[jax.Array, "*rows dim"]:
    """Returns x / rms(x) · (offset + weight) over the last axis, computed in float32, as `x.dtype`.

    A row is bitwise independent of the others and of their number. Zhang and Sennrich, 2019.
    """
    with jax.named_scope("rms_norm"):
        return _IMPLEMENTATIONS[backend](x, weight, eps=eps, offset=offset)


def _reference(x: jax.Array, weight: jax.Array, *, eps: float, offset: float) -> jax.Array:
    wide = x.astype(jnp.float32)
    return _scaled(wide, jnp.mean(wide * wide, -1, keepdims=True), weight, eps, offset, x.dtype)


def _cpu(x: jax.Array, weight: jax.Array, *, eps: float, offset: float) -> jax.Array:
    """The norm by XLA, summed so that a row's bits depend on nothing but the row.

    XLA's CPU backend hands a reduction to YNNPACK only above some 4,000 elements, and below it sums
    in another order, so `jnp.mean` of a row depends on how many rows there are. A dot with ones
    does not; two columns, because one would make it a matrix-vector product.
    """
    wide = x.astype(jnp.float32)
    total = lax.platform_dependent(wide * wide, cpu=_sum_by_dot, default=_sum_by_reduction)
    return _scaled(wide, total / x.shape[-1], weight, eps, offset, x.dtype)


def _sum_by_dot(x: jax.Array) -> jax.Array:
    dim = x.shape[-1]
    (totals,) = matmul.matmul(x.reshape(-1, dim), (jnp.ones((2, dim), x.dtype),))
    return totals[:, :1].reshape(*x.shape[:-1], 1)


def _sum_by_reduction(x: jax.Array) -> jax.Array:
    return jnp.sum(x, axis=-1, keepdims=True)


def _scaled(
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


_IMPLEMENTATIONS = implementations(_reference, cpu=_cpu, native=calls.rms_norm)
