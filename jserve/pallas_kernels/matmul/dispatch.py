"""The one entry to matrix products: contract, validation, choice of backend."""

from collections.abc import Sequence

import jax
from jaxtyping import Float, Float32, Int

from jserve.pallas_kernels.backend import Backend
from jserve.pallas_kernels.matmul import cpu, native, reference

_IMPLEMENTATIONS = {
    Backend.REFERENCE: reference.matmul,
    Backend.CPU: cpu.matmul,
    Backend.NATIVE: native.matmul,
}


def matmul(
    x: Float[jax.Array, "rows in_dim"],
    weights: Sequence[Float[jax.Array, "_ in_dim"]],
    *,
    num_rows: Int[jax.Array, ""] | None = None,
    backend: Backend,
) -> tuple[Float32[jax.Array, "rows _"], ...]:
    """X · weightᵀ for each weight [out, in], accumulated and returned in float32.

    With `num_rows` only the first so many rows of the results mean something; a backend may skip
    the others, whose results can then be anything, NaN included. A row is bitwise independent of
    the number of rows and of the others on CPU, unless the backend is the reference.
    """
    for weight in weights:
        if weight.ndim != 2 or weight.shape[1] != x.shape[1]:
            raise ValueError(f"a weight {weight.shape} does not fit rows of {x.shape[1]}")
    with jax.named_scope("matmul"):
        return _IMPLEMENTATIONS[backend](x, weights, num_rows)
