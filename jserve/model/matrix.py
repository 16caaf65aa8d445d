"""A weight matrix of a model, dense, in panels or quantized: declared once, used without knowing.

The only module that tells them apart.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from jserve.model.numerics import Numerics
from jserve.model.params import Encoding, param
from jserve.pallas_kernels.grouped_matmul.dispatch import grouped_matmul
from jserve.pallas_kernels.matmul import panels
from jserve.pallas_kernels.matmul.dispatch import matmul, wants_panels
from jserve.pallas_kernels.matmul.panels import PanelMatrix
from jserve.pallas_kernels.quantized_matmul import matrix as quantized
from jserve.pallas_kernels.quantized_matmul.dispatch import quantized_matmul
from jserve.pallas_kernels.quantized_matmul.matrix import QuantizedMatrix


class QuantizedParams(nnx.Module):
    """The two parameters of a quantized weight."""

    def __init__(
        self, shape: tuple[int, int], axes: tuple[str | None, str | None], bits: int, std: float
    ) -> None:
        codes, scales = quantized.quantized_shapes(shape, bits)
        # Panels of outputs and groups of inputs are what a mesh may split.
        spread: tuple[str | None, ...] = (*axes, None, None, None)
        parts = [Encoding(shape, quantized.PANEL, partial(_part, bits, part)) for part in (0, 1)]
        self.codes = param(codes, spread, jnp.uint8, std=std, encoding=parts[0])
        self.scales = param(scales, spread[:4], jnp.float16, std=std, encoding=parts[1])


Matrix = nnx.Param | QuantizedParams


def matrix(
    shape: tuple[int, int], axes: tuple[str | None, str | None], numerics: Numerics, *, bits: int
) -> Matrix:
    """Declares a weight [out, in] of `bits` a weight, 0 for the compute dtype."""
    std = shape[1] ** -0.5
    if bits:
        return QuantizedParams(shape, axes, bits, std)
    if wants_panels(numerics.backend):
        encoding = Encoding(shape, panels.PANEL, panels.to_panels, at_load=True)
        spread = (*axes, None)
        return param(panels.panel_shape(shape), spread, numerics.dtype, std=std, encoding=encoding)
    return param(shape, axes, numerics.dtype, std=std)


def matrices(
    shape: tuple[int, int, int],
    axes: tuple[str | None, str | None, str | None],
    numerics: Numerics,
) -> nnx.Param:
    """Declares a stack of weights [experts, out, in], in files a tensor each.

    Raises ValueError if weights of layers are to be quantized: there is no such product.
    """
    if numerics.layer_bits:
        raise ValueError("weights of experts cannot be quantized yet; choose none")
    std = shape[2] ** -0.5
    if wants_panels(numerics.backend):
        encoding = Encoding(shape, panels.PANEL, panels.to_panels, at_load=True)
        made, spread = panels.panel_shape(shape), (*axes, None)
        return param(made, spread, numerics.dtype, std=std, encoding=encoding, stacked=True)
    return param(shape, axes, numerics.dtype, std=std, stacked=True)


def products(
    x: Float[Array, "rows in_dim"],
    weights: Sequence[Matrix],
    numerics: Numerics,
    num_rows: Int[Array, ""] | None,
) -> tuple[Float32[Array, "rows _"], ...]:
    """X · weightᵀ of weights of one kind, as one op; see `matmul` and `quantized_matmul`."""
    values = [_value(weight) for weight in weights if isinstance(weight, QuantizedParams)]
    if values:
        assert len(values) == len(weights)
        return quantized_matmul(x, values, num_rows=num_rows, backend=numerics.backend)
    dense = [_dense(weight) for weight in weights if isinstance(weight, nnx.Param)]
    return matmul(x, dense, num_rows=num_rows, backend=numerics.backend)


def grouped_products(
    x: Float[Array, "rows in_dim"],
    weights: Sequence[nnx.Param],
    group_sizes: Int[Array, " experts"],
    numerics: Numerics,
) -> tuple[Float32[Array, "rows _"], ...]:
    """The rows of each expert · its weightᵀ, of stacks of weights; see `grouped_matmul`."""
    stacks = [_dense(weight) for weight in weights]
    return grouped_matmul(x, stacks, group_sizes, backend=numerics.backend)


def lookup(weight: Matrix, rows: Int[Array, " rows"]) -> Float[Array, "rows in_dim"]:
    """Some rows of a weight: in float32 if it is quantized."""
    if isinstance(weight, QuantizedParams):
        return quantized.take_rows(_value(weight), rows)
    value = _dense(weight)
    return panels.take_rows(value, rows) if isinstance(value, PanelMatrix) else value[rows]


def _dense(weight: nnx.Param) -> Any:
    """The weight, or the stack of weights, as `matmul` and `grouped_matmul` take it."""
    encoding: Encoding | None = weight.get_metadata()["encoding"]
    return PanelMatrix(weight[...], encoding.shape[-2]) if encoding else weight[...]


def _value(weight: QuantizedParams) -> QuantizedMatrix:
    return QuantizedMatrix(weight.codes[...], weight.scales[...])


def _part(bits: int, part: int, rows: np.ndarray) -> np.ndarray:
    return quantized.quantize(rows, bits)[part]
