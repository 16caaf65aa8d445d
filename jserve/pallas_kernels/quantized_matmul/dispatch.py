"""The one entry to quantized matmuls: contract, validation, choice of backend."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Float32, Int

from jserve.pallas_kernels.backend import Backend, implementations
from jserve.pallas_kernels.matmul import cpu
from jserve.pallas_kernels.native import calls
from jserve.pallas_kernels.quantized_matmul import reference, tpu
from jserve.pallas_kernels.quantized_matmul.channels import ChannelMatrix
from jserve.pallas_kernels.quantized_matmul.matrix import QuantizedMatrix, dequantize
from jserve.pallas_kernels.quantized_matmul.reference import rounded


def quantized_matmul(
    x: Float[jax.Array, "rows in_dim"],
    weights: Sequence[QuantizedMatrix] | Sequence[ChannelMatrix],
    *,
    num_rows: Int[jax.Array, ""] | None = None,
    backend: Backend,
) -> tuple[Float32[jax.Array, "rows _"], ...]:
    """Returns x · weightᵀ for each weight, accumulated and returned in float32.

    Weights in groups are for CPUs: they round activations to 8 bits per row and group. Weights with
    one scale per output leave activations as they are, because codes are exact in bfloat16.

    `num_rows` is as in `matmul`. A row is bitwise independent of the other rows and of their
    number, unless the backend is the reference, or an accelerator without a kernel (see
    `has_kernel`).
    """
    for weight in weights:
        if weight.shape[1] != x.shape[1]:
            raise ValueError(f"a weight {weight.shape} does not fit rows of {x.shape[1]}")
    groups = [weight for weight in weights if isinstance(weight, QuantizedMatrix)]
    channels = [weight for weight in weights if isinstance(weight, ChannelMatrix)]
    if groups and (channels or backend not in _GROUPS):
        raise TypeError(f"{backend} takes no weights in groups, or not beside others")
    with jax.named_scope("quantized_matmul"):
        if groups:
            return _GROUPS[backend](x, groups, num_rows)
        return _channel_matmul(x, channels, num_rows, backend)


def has_kernel(backend: Backend, out_dim: int, in_dim: int, dtype: jnp.dtype) -> bool:
    """Whether there is a kernel for a weight with a scale per output and activations of `dtype`.

    Without one, XLA converts the weight to floats before it multiplies.
    """
    kernels = _kernels(backend)
    return kernels is not None and kernels.fits(out_dim, in_dim, dtype)


def _kernels(backend: Backend) -> Any:
    """The module with the accelerator's kernel."""
    if backend is Backend.TPU:
        return tpu
    if backend is Backend.GPU:
        from jserve.pallas_kernels.quantized_matmul import gpu  # Mosaic imports in half a second

        return gpu
    return None


def _channel_matmul(
    x: jax.Array,
    weights: Sequence[ChannelMatrix],
    num_rows: jax.Array | None,
    backend: Backend,
) -> tuple[jax.Array, ...]:
    if all(has_kernel(backend, *weight.shape, x.dtype) for weight in weights):
        return _kernels(backend).channel_matmul(x, weights, num_rows)
    return _CHANNELS[backend](x, weights, num_rows)


def _group_matmul_on_cpu(
    x: jax.Array, weights: Sequence[QuantizedMatrix], num_rows: jax.Array | None
) -> tuple[jax.Array, ...]:
    """Multiplies by XLA, which converts the weights to floats first and takes long."""
    return cpu.matmul(rounded(x), [dequantize(weight) for weight in weights], num_rows)


def _channel_matmul_on_cpu(
    x: jax.Array, weights: Sequence[ChannelMatrix], num_rows: jax.Array | None
) -> tuple[jax.Array, ...]:
    ys = cpu.matmul(x, [weight.codes for weight in weights], num_rows)
    scales = (weight.scales[None, :] for weight in weights)
    return tuple(y * scale for y, scale in zip(ys, scales, strict=True))


_GROUPS = {
    Backend.REFERENCE: reference.quantized_matmul,
    Backend.CPU: _group_matmul_on_cpu,
    Backend.NATIVE: calls.quantized_matmul,
}
# Weights that have a kernel never come here.
_CHANNELS = implementations(
    reference.channel_matmul, cpu=_channel_matmul_on_cpu, native=_channel_matmul_on_cpu
)
