"""Weights of 8 bits with one scale per output: what accelerators read.

A weight [out, in] is code · scale[out], the codes int8 or float8_e4m3fn. Both are exact in
bfloat16, and a scale leaves the sum, so a kernel needs nothing but a conversion before the
product and one factor behind it; codes and scales split over devices as the weight does.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Int, Num

CODES = (jnp.dtype(jnp.int8), jnp.dtype(jnp.float8_e4m3fn))
_LARGEST = dict(zip(CODES, (127.0, 448.0), strict=True))


class ChannelMatrix(NamedTuple):
    """A weight in codes."""

    codes: Num[jax.Array, "out_dim in_dim"]  # one of CODES
    scales: Float32[jax.Array, " out_dim"]

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight: [out, in]."""
        out_dim, in_dim = self.codes.shape
        return out_dim, in_dim


class ChannelStack(NamedTuple):
    """Weights of experts in codes; where they are best laid out otherwise, `codes` is a view."""

    codes: Num[jax.Array, "experts out_dim in_dim"]  # one of CODES
    scales: Float32[jax.Array, "experts out_dim"]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of the stack: [experts, out, in]."""
        experts, out_dim, in_dim = self.codes.shape
        return experts, out_dim, in_dim


def channel_scales(
    rows: Float32[np.ndarray, "*experts out_dim in_dim"], dtype: jnp.dtype
) -> Float32[np.ndarray, "*experts out_dim"]:
    """The largest weight of an output becomes the largest code; zero for an output of zeros."""
    return np.abs(rows).max(axis=-1) / np.float32(_LARGEST[dtype])


def channel_codes(
    rows: Float32[np.ndarray, "*experts out_dim in_dim"], dtype: jnp.dtype
) -> Num[np.ndarray, "*experts out_dim in_dim"]:
    """The codes that go with `channel_scales`, the nearest ones, on the host."""
    largest, scales = _LARGEST[dtype], channel_scales(rows, dtype)
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales > 0)
    codes = (rows * inverse[..., None]).clip(-largest, largest)
    return (np.rint(codes, out=codes) if dtype == jnp.int8 else codes).astype(dtype)


def dequantize(matrix: ChannelMatrix) -> Float32[jax.Array, "out_dim in_dim"]:
    """The weight in float32."""
    return matrix.codes.astype(jnp.float32) * matrix.scales[:, None]


def take_rows(
    matrix: ChannelMatrix, rows: Int[jax.Array, " rows"]
) -> Float[jax.Array, "rows in_dim"]:
    """Some rows of the weight in float32: an embedding's lookup."""
    return dequantize(ChannelMatrix(matrix.codes[rows], matrix.scales[rows]))
