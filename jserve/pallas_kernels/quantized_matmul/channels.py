"""Weights of 8 bits with one scale per output, the format for accelerators.

A weight [out, in] is code · scale[out], with codes of int8 or float8_e4m3fn. Both are exact in
bfloat16 and a scale can be taken out of the sum, so a kernel converts codes before the matmul and
multiplies its result by the scale. Codes and scales split over devices as the weight does.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Int, Num

CODES = (jnp.dtype(jnp.int8), jnp.dtype(jnp.float8_e4m3fn))
_LARGEST = dict(zip(CODES, (127.0, 448.0), strict=True))


class ChannelMatrix(NamedTuple):
    """A weight [out, in] as codes and scales."""

    codes: Num[jax.Array, "out_dim in_dim"]  # one of CODES
    scales: Float32[jax.Array, " out_dim"]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the weight: [out, in]."""
        out_dim, in_dim = self.codes.shape
        return out_dim, in_dim


class ChannelStack(NamedTuple):
    """Weights of experts as codes and scales; `codes` may be a view of another layout."""

    codes: Num[jax.Array, "experts out_dim in_dim"]  # one of CODES
    scales: Float32[jax.Array, "experts out_dim"]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of the stack: [experts, out, in]."""
        experts, out_dim, in_dim = self.codes.shape
        return experts, out_dim, in_dim


def channel_scales(
    rows: Float32[np.ndarray, "*experts out_dim in_dim"], dtype: jnp.dtype
) -> Float32[np.ndarray, "*experts out_dim"]:
    """Scales that map each output's largest weight to the largest code; zero if all are zero."""
    return np.abs(rows).max(axis=-1) / np.float32(_LARGEST[dtype])


def channel_codes(
    rows: Float32[np.ndarray, "*experts out_dim in_dim"], dtype: jnp.dtype
) -> Num[np.ndarray, "*experts out_dim in_dim"]:
    """Rounds a weight to the nearest codes for the scales of `channel_scales`, on the host."""
    largest, scales = _LARGEST[dtype], channel_scales(rows, dtype)
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales > 0)
    codes = (rows * inverse[..., None]).clip(-largest, largest)
    return (np.rint(codes, out=codes) if dtype == jnp.int8 else codes).astype(dtype)


def dequantize(matrix: ChannelMatrix) -> Float32[jax.Array, "out_dim in_dim"]:
    """Returns the weight in float32."""
    return matrix.codes.astype(jnp.float32) * matrix.scales[:, None]


def take_rows(
    matrix: ChannelMatrix, rows: Int[jax.Array, " rows"]
) -> Float[jax.Array, "rows in_dim"]:
    """Looks up rows of the weight in float32, as an embedding does."""
    return dequantize(ChannelMatrix(matrix.codes[rows], matrix.scales[rows]))
