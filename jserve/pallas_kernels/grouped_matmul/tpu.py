"""Grouped products on TPU: XLA's own ragged product, which reads an expert's weights once."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

_DIMENSIONS = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (2,)), ((), ())),  # weights are [experts, out, in]
    lhs_ragged_dimensions=(0,),
    rhs_group_dimensions=(0,),
)


def grouped_matmul(
    x: jax.Array, weights: Sequence[jax.Array], group_sizes: jax.Array
) -> tuple[jax.Array, ...]:
    """See `dispatch`."""
    return tuple(
        lax.ragged_dot_general(
            x,
            weight,
            group_sizes,
            _DIMENSIONS,
            # Float32 means float32, on the matrix units too.
            precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
            preferred_element_type=jnp.float32,
        )
        for weight in weights
    )
