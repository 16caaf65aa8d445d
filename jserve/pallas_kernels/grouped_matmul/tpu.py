"""Grouped products on TPU: XLA's own ragged product, which reads an expert's weights once.

For TPUs the compiler makes two Mosaic launches of it: one lists the tiles of rows that each expert
has, one walks the list and fetches weights by it, as JAX's own megablox does. Compiled for v5e,
v5p and v6e at the sizes of Qwen3-30B-A3B (128 experts of 768) and Mixtral, it has no temporaries
and counts the flops of the rows alone, so experts without rows are not read; megablox compiles to
the same traffic, with some thirty small fusions before it that make the list. So there is no
kernel of our own here until a measurement says otherwise.

The launch wants weights [experts, in, out] with whole lanes of outputs (128): of any others the
compiler makes a copy in every call, all experts of it. The stacks that come here are therefore
views of arrays laid out so (see `dispatch.wants_inputs_first`), and experts are better spread
over devices whole than cut below 128 outputs. Codes of int8 go into the launch as they are; of
fp8 the compiler would make floats first, of all experts, so there are no such experts.

It also wants rows in whole tiles of 8: of any other number of rows it multiplies every one by all
experts, and so reads all of them. Rows of no expert fill the last tile.
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
    """See `dispatch`."""
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
