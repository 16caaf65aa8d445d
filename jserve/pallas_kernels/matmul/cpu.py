"""Matmuls by XLA's CPU kernels, used so that a row's bits depend on nothing but the row.

XLA's matrix kernels sum each output in the order of the contracted axis. A single row would take a
matrix-vector kernel with another order, so it is computed as two rows. Long sums are cut into runs,
because the error of a sum in order grows with its length: beside an attention sink it would exceed
the error of the usual libraries several times. The slices are copies, a third of a step's time.

On CPU every operand is float32. XLA gives dots of bfloat16 to libraries that run them on AMX where
the processor has it, in tiles that let a row's bits depend on the other rows; AMX has no float32.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

_LONG = 512  # longest sum that is made in one run
_RUN = 256  # elements of a run of longer sums


def matmul(
    x: jax.Array, weights: Sequence[jax.Array], num_rows: jax.Array | None = None
) -> tuple[jax.Array, ...]:
    """Implements `dispatch.matmul`; weights may also be codes that `x.dtype` holds exactly."""
    rows = x.shape[0]
    if rows == 1:
        x = jnp.concatenate((x, jnp.zeros_like(x)))
    return tuple(_in_turn(x, weight, num_rows)[:rows] for weight in weights)


def einsum(spec: str, a: jax.Array, b: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Sums in float32; operands are cast to float32 on CPU and to `dtype` elsewhere."""

    def wide(a: jax.Array, b: jax.Array) -> jax.Array:
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        # Float32 means float32, on the matrix units of accelerators too.
        return jnp.einsum(spec, a, b, precision=lax.Precision.HIGHEST)

    def narrow(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.einsum(
            spec, a.astype(dtype), b.astype(dtype), preferred_element_type=jnp.float32
        )

    if dtype == jnp.float32:
        return wide(a, b)
    return lax.platform_dependent(a, b, cpu=wide, default=narrow)


def _in_turn(x: jax.Array, weight: jax.Array, num_rows: jax.Array | None) -> jax.Array:
    """Multiplies x with a weight that is widened when its turn comes and no sooner.

    XLA's scheduler would widen the weights of all layers at once, and ahead of a loop that uses
    them, at three times the memory. It moves nothing out of a branch, and every batch that has
    tokens takes this branch.
    """
    if weight.dtype == jnp.float32 or num_rows is None:
        return _dot_in_runs(x, weight)
    nothing = jnp.zeros((x.shape[0], weight.shape[0]), jnp.float32)
    return lax.cond(num_rows > 0, _dot_in_runs, lambda *_: nothing, x, weight)


def _dot_in_runs(x: jax.Array, weight: jax.Array) -> jax.Array:
    in_dim = x.shape[1]
    run = in_dim if in_dim <= _LONG else _RUN
    first, *others = (
        einsum("ri,oi->ro", x[:, at : at + run], weight[:, at : at + run], x.dtype)
        for at in range(0, in_dim, run)
    )
    return sum(others, start=first)
