"""Weights of 4 or 8 bits in groups: layout, quantization and dequantization.

A weight [out, in] is code · scale + offset, with one scale and one offset per output and group of
32 inputs, as in GGUF's Q4_1. A Q4_1 tensor that was dequantized is quantized again without loss
where every group uses the first and the last code, as llama.cpp's plain quantization makes it.
Codes lie as the inner loop of a matmul reads them: in panels of 16 outputs, and in each group
four inputs of an output side by side. A byte of two codes has one of the group's first half in its
low bits.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt8

GROUP = 32  # inputs that share a scale
PANEL = 16  # outputs side by side
_QUAD = 4  # inputs of an output side by side


class QuantizedMatrix(NamedTuple):
    """A weight in codes: 8 quads a group for 8 bits; for 4 bits 4 quads with two codes a byte."""

    codes: UInt8[jax.Array, "panels groups quads 16 4"]
    scales: Float[jax.Array, "panels groups 2 16"]  # float16: scale, offset

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the weight: [out, in]."""
        return self.codes.shape[0] * PANEL, self.codes.shape[1] * GROUP

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 8 if self.codes.shape[2] == GROUP // _QUAD else 4


def quantized_shapes(shape: tuple[int, int], bits: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of codes and scales of a weight [out, in].

    Raises ValueError if panels and groups do not divide it.
    """
    out_dim, in_dim = shape
    if out_dim % PANEL or in_dim % GROUP:
        raise ValueError(f"a weight {shape} has no whole panels of {PANEL} and groups of {GROUP}")
    panels, groups = out_dim // PANEL, in_dim // GROUP
    return (panels, groups, GROUP // _QUAD * bits // 8, PANEL, _QUAD), (panels, groups, 2, PANEL)


def quantize(rows: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Quantizes a float32 weight [out, in] to codes and scales, on the host.

    The smallest weight of a group is code 0, the largest the last one, both within float16.
    """
    codes_shape, _ = quantized_shapes((rows.shape[0], rows.shape[1]), bits)
    groups = rows.reshape(-1, PANEL, rows.shape[1] // GROUP, GROUP)
    top = (1 << bits) - 1
    low, high = groups.min(-1), groups.max(-1)
    scale, offset = ((high - low) / top).astype(np.float16), low.astype(np.float16)
    step = scale.astype(np.float32)
    inverse = np.divide(1, step, out=np.zeros_like(step), where=step > 0)
    codes = np.rint((groups - offset[..., None].astype(np.float32)) * inverse[..., None])
    codes = codes.clip(0, top).astype(np.uint8)
    codes = codes.reshape(*groups.shape[:3], GROUP // _QUAD, _QUAD).transpose(0, 2, 3, 1, 4)
    if bits == 4:
        half = codes.shape[2] // 2
        codes = codes[:, :, :half] | codes[:, :, half:] << 4
    assert codes.shape == codes_shape
    return np.ascontiguousarray(codes), np.stack((scale, offset), -1).transpose(0, 2, 3, 1).copy()


def dequantize(matrix: QuantizedMatrix) -> Float[jax.Array, "out_dim in_dim"]:
    """Returns the weight in float32."""
    values = _values(_unpacked(matrix.codes, axis=2), matrix.scales[:, :, :, :, None])
    # [panels, groups, quads, 16, 4] → [panels, 16, groups, quads, 4]
    return values.transpose(0, 3, 1, 2, 4).reshape(matrix.shape)


def take_rows(
    matrix: QuantizedMatrix, rows: Int[jax.Array, " rows"]
) -> Float[jax.Array, "rows in_dim"]:
    """Looks up rows of the weight in float32, as an embedding does."""
    panel, lane = rows // PANEL, rows % PANEL
    codes = _unpacked(matrix.codes[panel, :, :, lane], axis=2)  # [rows, groups, quads, 4]
    scales = matrix.scales[panel, :, :, lane]  # [rows, groups, 2]
    return _values(codes, scales[:, :, :, None]).reshape(len(rows), matrix.shape[1])


def _unpacked(codes: jax.Array, axis: int) -> jax.Array:
    """Unpacks codes of 4 bits to one a byte; codes of 8 bits stay as they are."""
    if codes.shape[axis] == GROUP // _QUAD:
        return codes
    return jnp.concatenate((codes & 15, codes >> 4), axis=axis)


def _values(codes: jax.Array, scales: jax.Array) -> jax.Array:
    scale, offset = scales.astype(jnp.float32)[:, :, 0], scales.astype(jnp.float32)[:, :, 1]
    return codes.astype(jnp.float32) * scale[:, :, None] + offset[:, :, None]
