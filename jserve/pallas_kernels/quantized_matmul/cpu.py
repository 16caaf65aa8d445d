"""Quantized products by XLA's CPU kernels: weights are made floats first, which takes long."""

from collections.abc import Sequence

import jax

from jserve.pallas_kernels.matmul import cpu as matmul
from jserve.pallas_kernels.quantized_matmul.channels import ChannelMatrix
from jserve.pallas_kernels.quantized_matmul.matrix import QuantizedMatrix, dequantize
from jserve.pallas_kernels.quantized_matmul.reference import rounded


def quantized_matmul(
    x: jax.Array, weights: Sequence[QuantizedMatrix], num_rows: jax.Array | None
) -> tuple[jax.Array, ...]:
    """See `dispatch`."""
    return matmul.matmul(rounded(x), [dequantize(weight) for weight in weights], num_rows)


def channel_matmul(
    x: jax.Array, weights: Sequence[ChannelMatrix], num_rows: jax.Array | None
) -> tuple[jax.Array, ...]:
    """See `dispatch`."""
    products = matmul.matmul(x, [weight.codes for weight in weights], num_rows)
    scales = (weight.scales[None, :] for weight in weights)
    return tuple(product * scale for product, scale in zip(products, scales, strict=True))
