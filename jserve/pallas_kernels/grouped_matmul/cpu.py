"""Grouped matmuls by XLA's CPU kernels: a loop over blocks of rows that share an expert.

Only experts that have rows are read, and every matmul has at least two rows, so a row's bits
depend on nothing but the row (see `matmul.cpu`). A block may reach into the rows of the next
experts, whose blocks come later and overwrite them, so nothing is padded or masked.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jserve.pallas_kernels.matmul import cpu as matmul

_MIN_BLOCK, _MAX_BLOCK = 2, 128  # rows


def grouped_matmul(
    x: jax.Array, weights: Sequence[jax.Array], group_sizes: jax.Array
) -> tuple[jax.Array, ...]:
    rows, experts = x.shape[0], group_sizes.shape[0]
    block = _block_rows(rows, experts)
    starts = jnp.cumsum(group_sizes) - group_sizes
    num_blocks = (group_sizes + block - 1) // block
    last_blocks = jnp.cumsum(num_blocks)
    padded = jnp.pad(x, ((0, block), (0, 0)))

    def multiply(i: jax.Array, ys: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        expert = jnp.sum(last_blocks <= i)
        at = starts[expert] + (i - last_blocks[expert] + num_blocks[expert]) * block
        part = lax.dynamic_slice_in_dim(padded, at, block)
        chosen = [lax.dynamic_index_in_dim(weight, expert, keepdims=False) for weight in weights]
        sums = matmul.matmul(part, chosen)
        return tuple(
            lax.dynamic_update_slice_in_dim(y, new, at, axis=0)
            for y, new in zip(ys, sums, strict=True)
        )

    zeros = tuple(jnp.zeros((rows + block, w.shape[1]), jnp.float32) for w in weights)
    ys = lax.fori_loop(0, last_blocks[-1], multiply, zeros)
    return tuple(y[:rows] for y in ys)


def _block_rows(rows: int, experts: int) -> int:
    """Rows of a block: a power of two, about the share of an expert if all get the same."""
    share = max(rows // experts, 1)
    return min(max(1 << (share - 1).bit_length(), _MIN_BLOCK), _MAX_BLOCK)
