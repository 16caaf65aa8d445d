"""Weight matrices of a model: dense, in panels, or quantized.

No other module tells these kinds apart.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Float32, Int

from jserve.checkpoints.config import WeightKind
from jserve.model.numerics import Numerics
from jserve.model.params import Encoding, ParamSpec, param
from jserve.model.sharding import num_devices
from jserve.pallas_kernels.grouped_matmul.dispatch import grouped_matmul, wants_inputs_first
from jserve.pallas_kernels.matmul import panels
from jserve.pallas_kernels.matmul.dispatch import matmul, wants_panels
from jserve.pallas_kernels.matmul.panels import PanelMatrix
from jserve.pallas_kernels.quantized_matmul import channels
from jserve.pallas_kernels.quantized_matmul import matrix as quantized
from jserve.pallas_kernels.quantized_matmul.channels import ChannelMatrix, ChannelStack
from jserve.pallas_kernels.quantized_matmul.dispatch import has_kernel, quantized_matmul
from jserve.pallas_kernels.quantized_matmul.matrix import QuantizedMatrix
from jserve.pallas_kernels.quantized_matmul.sharded import SPLIT_BY_XLA, Split, sharded_matmul


class GroupParams(nnx.Module):
    """The two parameters of a weight in groups."""

    def __init__(
        self, shape: tuple[int, int], axes: tuple[str | None, str | None], bits: int, std: float
    ) -> None:
        codes, scales = quantized.quantized_shapes(shape, bits)
        # A mesh may split panels of outputs and groups of inputs.
        spread: tuple[str | None, ...] = (*axes, None, None, None)
        parts = [Encoding(shape, quantized.PANEL, partial(_part, bits, part)) for part in (0, 1)]
        self.codes = param(codes, spread, jnp.uint8, std=std, encoding=parts[0])
        self.scales = param(scales, spread[:4], jnp.float16, std=std, encoding=parts[1])

    def value(self) -> QuantizedMatrix:
        """The weight as `quantized_matmul` takes it."""
        return QuantizedMatrix(self.codes[...], self.scales[...])

    def take_rows(self, rows: Int[Array, " rows"]) -> Float32[Array, "rows in_dim"]:
        return quantized.take_rows(self.value(), rows)


class ChannelParams(nnx.Module):
    """The two parameters of a weight with a scale per output, split as the weight would be."""

    def __init__(
        self,
        shape: tuple[int, int],
        axes: tuple[str | None, str | None],
        dtype: jnp.dtype,
        std: float,
    ) -> None:
        codes = Encoding(shape, 1, partial(channels.channel_codes, dtype=dtype))
        scales = Encoding(shape, 1, partial(channels.channel_scales, dtype=dtype))
        self.codes = param(shape, axes, dtype, std=std, encoding=codes)
        self.scales = param(shape[:1], axes[:1], jnp.float32, std=std, encoding=scales)

    def value(self) -> ChannelMatrix:
        """The weight as `quantized_matmul` takes it."""
        return ChannelMatrix(self.codes[...], self.scales[...])

    def take_rows(self, rows: Int[Array, " rows"]) -> Float32[Array, "rows in_dim"]:
        return channels.take_rows(self.value(), rows)

    def axes(self) -> tuple[str | None, str | None]:
        """The logical axes of the weight."""
        return self.codes.get_metadata()["axes"]


class ExpertParams(nnx.Module):
    """The two parameters of a stack of weights of experts, with a scale per output."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        axes: tuple[str | None, str | None, str | None],
        dtype: jnp.dtype,
        std: float,
        order: tuple[int, ...],  # order of the codes, see `Encoding.order`
    ) -> None:
        self.is_transposed = bool(order)
        encode, measure = (
            partial(part, dtype=dtype) for part in (channels.channel_codes, channels.channel_scales)
        )
        codes, scales = Encoding(shape, 1, encode, order=order), Encoding(shape, 1, measure)
        made, spread = _ordered(shape, order), _ordered(axes, order)
        self.codes = param(made, spread, dtype, std=std, encoding=codes, stacked=True)
        self.scales = param(
            shape[:2], axes[:2], jnp.float32, std=std, encoding=scales, stacked=True
        )

    def value(self) -> ChannelStack:
        """The stack as `grouped_matmul` takes it."""
        codes = self.codes[...]
        return ChannelStack(codes.swapaxes(1, 2) if self.is_transposed else codes, self.scales[...])


Matrix = nnx.Param | GroupParams | ChannelParams
Matrices = nnx.Param | ExpertParams

_GROUP_BITS = {WeightKind.INT4_GROUPS: 4, WeightKind.INT8_GROUPS: 8}
_CHANNEL_CODES = {
    WeightKind.INT8_CHANNELS: jnp.dtype(jnp.int8),
    WeightKind.FP8_CHANNELS: jnp.dtype(jnp.float8_e4m3fn),
}


def matrix(
    shape: tuple[int, int],
    axes: tuple[str | None, str | None],
    numerics: Numerics,
    kind: WeightKind,
) -> Matrix:
    """Declares a weight [out, in]."""
    std = shape[1] ** -0.5
    if kind in _GROUP_BITS:
        return GroupParams(shape, axes, _GROUP_BITS[kind], std)
    if kind in _CHANNEL_CODES:
        return ChannelParams(shape, axes, _CHANNEL_CODES[kind], std)
    if wants_panels(numerics.backend):
        encoding = Encoding(shape, panels.PANEL, panels.to_panels, at_load=True)
        spread = (*axes, None)
        return param(panels.panel_shape(shape), spread, numerics.dtype, std=std, encoding=encoding)
    return param(shape, axes, numerics.dtype, std=std)


def matrices(
    shape: tuple[int, int, int],
    axes: tuple[str | None, str | None, str | None],
    numerics: Numerics,
) -> Matrices:
    """Declares a stack of weights [experts, out, in]; files hold one tensor per expert.

    Raises ValueError if experts cannot be of the kind of the layers' weights.
    """
    std = shape[2] ** -0.5
    order = (0, 2, 1) if wants_inputs_first(numerics.backend) else ()
    if numerics.layers is WeightKind.INT8_CHANNELS:
        return ExpertParams(shape, axes, _CHANNEL_CODES[numerics.layers], std, order)
    if numerics.layers is not WeightKind.FLOAT:
        raise ValueError("weights of experts cannot be quantized so; choose int8_channel or none")
    if wants_panels(numerics.backend):
        encoding = Encoding(shape, panels.PANEL, panels.to_panels, at_load=True)
        made, spread = panels.panel_shape(shape), (*axes, None)
        return param(made, spread, numerics.dtype, std=std, encoding=encoding, stacked=True)
    encoding = Encoding(shape, shape[1], _same, at_load=True, order=order) if order else None
    made, spread = _ordered(shape, order), _ordered(axes, order)
    return param(made, spread, numerics.dtype, std=std, encoding=encoding, stacked=True)


def _ordered(values: tuple[Any, ...], order: tuple[int, ...]) -> tuple[Any, ...]:
    return tuple(values[order.index(at)] for at in range(len(values))) if order else values


def _same(stack: np.ndarray) -> np.ndarray:
    return stack


def matmul_weights(
    x: Float[Array, "rows in_dim"],
    weights: Sequence[Matrix],
    numerics: Numerics,
    num_rows: Int[Array, ""] | None,
) -> tuple[Float32[Array, "rows _"], ...]:
    """Multiplies `x` by the transpose of several weights of one kind, as one op."""
    dense = [_dense(weight) for weight in weights if isinstance(weight, nnx.Param)]
    groups = [weight.value() for weight in weights if isinstance(weight, GroupParams)]
    by_channel = [weight for weight in weights if isinstance(weight, ChannelParams)]
    assert len(weights) in map(len, (dense, groups, by_channel))
    if by_channel:
        return _matmul_channel_weights(x, by_channel, numerics, num_rows)
    if groups:
        return quantized_matmul(x, groups, num_rows=num_rows, backend=numerics.backend)
    return matmul(x, dense, num_rows=num_rows, backend=numerics.backend)


def _matmul_channel_weights(
    x: Array, weights: Sequence[ChannelParams], numerics: Numerics, num_rows: Array | None
) -> tuple[Array, ...]:
    values, backend, mesh = [weight.value() for weight in weights], numerics.backend, numerics.mesh
    if mesh is None or mesh.size == 1 or backend in SPLIT_BY_XLA:
        return quantized_matmul(x, values, num_rows=num_rows, backend=backend)
    splits = [_split(weight.axes(), numerics) for weight in weights]
    return sharded_matmul(x, values, splits, num_rows=num_rows, backend=backend, mesh=mesh)


def _split(axes: tuple[str | None, ...], numerics: Numerics) -> Split:
    """The mesh axes of outputs and inputs of a weight."""
    out_axes, in_axes = (axis and numerics.rules.get(axis) for axis in axes)
    return out_axes, in_axes


def unaccelerated_weights(
    specs: Mapping[str, ParamSpec], numerics: Numerics
) -> dict[str, tuple[int, int]]:
    """Weights with a scale per output that the backend has no kernel for: shapes on one device."""
    found: dict[str, tuple[int, int]] = {}
    for name, spec in specs.items():
        if spec.dtype in channels.CODES and len(spec.shape) == 2:
            sizes = (
                num_devices(numerics.mesh, axes) if numerics.mesh else 1
                for axes in _split(spec.axes, numerics)
            )
            out_dim, in_dim = (n // size for n, size in zip(spec.shape, sizes, strict=True))
            if not has_kernel(numerics.backend, out_dim, in_dim, numerics.dtype):
                found[name.removesuffix(".codes")] = (out_dim, in_dim)
    return found


def matmul_expert_weights(
    x: Float[Array, "rows in_dim"],
    weights: Sequence[Matrices],
    group_sizes: Int[Array, " experts"],
    numerics: Numerics,
) -> tuple[Float32[Array, "rows _"], ...]:
    """Multiplies the rows of each expert by the transpose of its weight, for several stacks."""
    stacks: list[Any] = [
        weight.value() if isinstance(weight, ExpertParams) else _dense(weight) for weight in weights
    ]
    return grouped_matmul(x, stacks, group_sizes, backend=numerics.backend)


def lookup(weight: Matrix, rows: Int[Array, " rows"]) -> Float[Array, "rows in_dim"]:
    """Rows of a weight: in float32 if it is quantized."""
    if isinstance(weight, GroupParams | ChannelParams):
        return weight.take_rows(rows)
    value = _dense(weight)
    return panels.take_rows(value, rows) if isinstance(value, PanelMatrix) else value[rows]


def _dense(weight: nnx.Param) -> Any:
    """The weight, or the stack, as `matmul` and `grouped_matmul` take it."""
    encoding: Encoding | None = weight.get_metadata()["encoding"]
    if encoding is None:
        return weight[...]
    if encoding.order:
        return weight[...].swapaxes(-1, -2)  # the compiler renames dimensions and copies nothing
    return PanelMatrix(weight[...], encoding.shape[-2])


def _part(bits: int, part: int, rows: np.ndarray) -> np.ndarray:
    return quantized.quantize(rows, bits)[part]
