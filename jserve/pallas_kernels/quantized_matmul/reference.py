"""The definition of quantized matmuls, in plain jnp."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jserve.pallas_kernels.matmul.reference import dot
from jserve.pallas_kernels.quantized_matmul.channels import ChannelMatrix
from jserve.pallas_kernels.quantized_matmul.matrix import GROUP, QuantizedMatrix, dequantize

_SMALLEST = 1e-30  # a group whose largest activation is no larger counts as zero


def rounded(x: jax.Array) -> jax.Array:
    """Rounds activations to 8-bit codes times a scale per row and group: float32 [rows, in_dim]."""
    groups = x.astype(jnp.float32).reshape(x.shape[0], -1, GROUP)
    top = jnp.max(jnp.abs(groups), axis=-1, keepdims=True)
    top = jnp.where(top > _SMALLEST, top, 0.0) + 0.0 * jnp.sum(groups, axis=-1, keepdims=True)
    codes = jnp.round(groups * jnp.where(top > 0, 127.0 / top, 0.0))
    return (codes * (top / 127.0)).reshape(x.shape)


def quantized_matmul(
    x: jax.Array, weights: Sequence[QuantizedMatrix], num_rows: jax.Array | None
) -> tuple[jax.Array, ...]:
    del num_rows
    return tuple(dot(rounded(x), dequantize(weight)) for weight in weights)


def channel_matmul(
    x: jax.Array, weights: Sequence[ChannelMatrix], num_rows: jax.Array | None
) -> tuple[jax.Array, ...]:
    del num_rows
    return tuple(
        dot(x, weight.codes.astype(x.dtype)) * weight.scales[None, :] for weight in weights
    )
