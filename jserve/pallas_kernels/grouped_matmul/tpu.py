"""Grouped matmuls on TPU: XLA's own ragged dot, which reads an expert's weights once.

The TPU compiler makes two Mosaic launches of a ragged dot: one lists the tiles of rows of each
expert, one walks the list and fetches weights by it, as JAX's own megablox does. Compiled for v5e,
v5p and v6e at the sizes of Qwen3-30B-A3B (128 experts of 768) and Mixtral, it has no temporaries
and counts the flops of the rows alone, so experts without rows are not read; megablox compiles to
the same traffic, with some thirty small fusions before it that make the list. So jserve has no
kernel here until a measurement says otherwise.

The launch wants weights [experts, in, out] with whole lanes of outputs (128): the compiler copies
stacks of any other shape in every call, all experts of them. So stacks here are views of arrays in
that layout (see `dispatch.wants_inputs_first`), and experts are better spread over devices whole
than cut below 128 outputs. Codes of int8 go into the launch as they are; codes of fp8 the compiler
would convert first, for all experts, so experts are never fp8.

It also wants rows in whole tiles of 8: otherwise it multiplies every row by all experts, and so
reads all of them. Rows of no expert fill the last tile.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

_DIMENSIONS = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (2,)), ((), ())),  # weights are [experts, out, in]
    lhs_ragged_dimensions=(0,),
    rhs_group_dimensions=(0,),
)
_SUBLANES = 8


def grouped_matmul(
    x: jax.Array, weights: Sequence[jax.Array], group_sizes: jax.Array
) -> tuple[jax.Array, ...]:
    rows = x.shape[0]
    whole = jnp.pad(x, ((0, -rows % _SUBLANES), (0, 0)))
    return tuple(
        lax.ragged_dot_general(
            whole,
            weight,
            group_sizes,
            _DIMENSIONS,
            # Float32 means float32, on the matrix units too.
            precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
            preferred_element_type=jnp.float32,
        )[:rows]
        for weight in weights
    )
