"""The one entry to matmuls: contract, validation, choice of backend."""

from collections.abc import Sequence

import jax
from jaxtyping import Float, Float32, Int

from jserve.pallas_kernels.backend import Backend, implementations
from jserve.pallas_kernels.matmul import cpu, reference
from jserve.pallas_kernels.matmul.panels import PanelMatrix
from jserve.pallas_kernels.native import calls

_IMPLEMENTATIONS = implementations(reference.matmul, cpu=cpu.matmul, native=calls.matmul)


def wants_panels(backend: Backend) -> bool:
    """Whether `matmul` takes weights as `PanelMatrix` rather than arrays [out, in]."""
    return backend is Backend.NATIVE


def matmul(
    x: Float[jax.Array, "rows in_dim"],
    weights: Sequence[Float[jax.Array, "_ in_dim"]] | Sequence[PanelMatrix],
    *,
    num_rows: Int[jax.Array, ""] | None = None,
    backend: Backend,
) -> tuple[Float32[jax.Array, "rows _"], ...]:
    """Returns x · weightᵀ for each weight [out, in], accumulated and returned in float32.

    Weights are panels or arrays, as `wants_panels` says for the backend. With `num_rows` only the
    first `num_rows` rows of the results mean something; a backend may skip the others and leave
    anything there, NaN included. On CPU a row is bitwise independent of the other rows and of their
    number, unless the backend is the reference.
    """
    for weight in weights:
        if isinstance(weight, PanelMatrix) != wants_panels(backend):
            raise TypeError(f"{backend} takes panels: {wants_panels(backend)}")
        if len(weight.shape) != 2 or weight.shape[1] != x.shape[1]:
            raise ValueError(f"a weight {weight.shape} does not fit rows of {x.shape[1]}")
    with jax.named_scope("matmul"):
        return _IMPLEMENTATIONS[backend](x, weights, num_rows)
