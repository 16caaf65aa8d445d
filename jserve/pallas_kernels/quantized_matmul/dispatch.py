"""The one entry to products with quantized weights: contract, validation, choice of backend."""

from collections.abc import Sequence

import jax
from jaxtyping import Float, Float32, Int

from jserve.pallas_kernels.backend import Backend
from jserve.pallas_kernels.quantized_matmul import cpu, native, reference
from jserve.pallas_kernels.quantized_matmul.matrix import QuantizedMatrix

_IMPLEMENTATIONS = {
    Backend.REFERENCE: reference.quantized_matmul,
    Backend.CPU: cpu.quantized_matmul,
    Backend.NATIVE: native.quantized_matmul,
    Backend.TPU: reference.quantized_matmul,
}


def quantized_matmul(
    x: Float[jax.Array, "rows in_dim"],
    weights: Sequence[QuantizedMatrix],
    *,
    num_rows: Int[jax.Array, ""] | None = None,
    backend: Backend,
) -> tuple[Float32[jax.Array, "rows _"], ...]:
    """X · weightᵀ for each weight, the activations rounded to 8 bits per row and group.

    Accumulated and returned in float32. `num_rows` and the independence of rows are as in
    `matmul`.
    """
    for weight in weights:
        if weight.shape[1] != x.shape[1]:
            raise ValueError(f"a weight {weight.shape} does not fit rows of {x.shape[1]}")
    with jax.named_scope("quantized_matmul"):
        return _IMPLEMENTATIONS[backend](x, weights, num_rows)
