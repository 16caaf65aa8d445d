"""Matrix products by XLA's CPU kernels, used so that a row's bits depend on nothing but the row.

Every matrix kernel sums one output in the order of the contracted axis. A single row would take
a matrix-vector kernel with another order, so it is computed as two. Long sums are made of shorter
ones, because in order their error grows with the length: beside an attention sink it would exceed
that of the usual libraries several times. The slices are copies, which takes a third of a step.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jserve.pallas_kernels.matmul.reference import dot

_LONG = 1024  # elements of a sum that is still made in one run
_RUN = 384  # elements of a run otherwise


def matmul(
    x: jax.Array, weights: Sequence[jax.Array], num_rows: jax.Array | None = None
) -> tuple[jax.Array, ...]:
    """See `dispatch`."""
    del num_rows
    rows = x.shape[0]
    if rows == 1:
        x = jnp.concatenate((x, jnp.zeros_like(x)))
    return tuple(_product(x, weight)[:rows] for weight in weights)


def _product(x: jax.Array, weight: jax.Array) -> jax.Array:
    in_dim = x.shape[1]
    if in_dim <= _LONG:
        return dot(x, weight)
    starts = range(0, in_dim, _RUN)
    return sum(
        (dot(x[:, at : at + _RUN], weight[:, at : at + _RUN]) for at in starts[1:]),
        start=dot(x[:, :_RUN], weight[:, :_RUN]),
    )
