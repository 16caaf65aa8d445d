"""Quantized matmuls: against float64 on every backend, and what quantization itself promises."""

import functools

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jserve.pallas_kernels.backend import Backend
from jserve.pallas_kernels.quantized_matmul.dispatch import quantized_matmul
from jserve.pallas_kernels.quantized_matmul.matrix import (
    GROUP,
    QuantizedMatrix,
    dequantize,
    quantize,
    take_rows,
)
from tests.backends import BACKENDS, NATIVE_MARKS

SHAPES = [(576, (576, 192, 192)), (1536, (576,)), (96, (16, 80)), (32, (1024,))]
ROWS = (1, 2, 3, 4, 5, 16, 67)
# XLA's code makes floats of the weights and multiplies as `test_matmul` shows in all shapes.
INVARIANT = [(Backend.CPU, SHAPES[2]), *((Backend.NATIVE, shape) for shape in SHAPES)]


def _matrix(rows: np.ndarray, bits: int) -> QuantizedMatrix:
    return QuantizedMatrix(*map(jnp.asarray, quantize(rows, bits)))


def _decoded(matrix: QuantizedMatrix) -> np.ndarray:
    """The weight, entry by entry as the documentation describes the layout, float64."""
    codes, scales = np.asarray(matrix.codes), np.asarray(matrix.scales, np.float64)
    out, column = np.indices(matrix.shape)
    group, place = column // GROUP, column % GROUP
    high = (matrix.bits == 4) & (place >= GROUP // 2)
    place = np.where(high, place - GROUP // 2, place)
    byte = codes[out // 16, group, place // 4, out % 16, place % 4]
    code = byte if matrix.bits == 8 else np.where(high, byte >> 4, byte & 15)
    return code * scales[out // 16, group, 0, out % 16] + scales[out // 16, group, 1, out % 16]


def _rounded(x: np.ndarray) -> np.ndarray:
    groups = x.astype(np.float64).reshape(len(x), -1, GROUP)
    scale = np.abs(groups).max(-1, keepdims=True) / 127
    codes = np.rint(np.divide(groups, scale, out=np.zeros_like(groups), where=scale > 0))
    return (codes * scale).reshape(x.shape)


def _problem(in_dim: int, out_dims: tuple[int, ...], bits: int):
    rng = np.random.default_rng(5)
    x = rng.normal(size=(max(ROWS), in_dim)).astype(np.float32)
    x[1, :GROUP] = 0.0  # a group that has no scale
    return x, [_matrix(rng.normal(size=(out, in_dim)).astype(np.float32), bits) for out in out_dims]


def _run(backend: Backend):
    return jax.jit(functools.partial(quantized_matmul, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("in_dim", "out_dims"), SHAPES)
def test_agrees_with_float64(
    in_dim: int, out_dims: tuple[int, ...], bits: int, backend: Backend
) -> None:
    x, weights = _problem(in_dim, out_dims, bits)
    for y, weight in zip(_run(backend)(x, weights), weights, strict=True):
        expected = _rounded(x) @ _decoded(weight).T
        # An activation that lies at the border of two codes may be rounded either way.
        step = np.abs(x).max() / 127 * np.abs(_decoded(weight)).max()
        error = np.abs(np.asarray(y, np.float64) - expected)
        assert (error <= 2 * step).all()
        assert np.mean(error > 1e-4 * np.abs(expected).max()) < 1e-3


@pytest.mark.optimized
@pytest.mark.parametrize(
    ("backend", "shape"),
    [
        pytest.param(*case, marks=NATIVE_MARKS if case[0] is Backend.NATIVE else ())
        for case in INVARIANT
    ],
)
@pytest.mark.parametrize("bits", [4, 8])
def test_a_row_does_not_depend_on_the_others(
    shape: tuple[int, tuple[int, ...]], bits: int, backend: Backend
) -> None:
    x, weights = _problem(*shape, bits)
    run = _run(backend)
    whole = run(x, weights)
    for rows in ROWS:
        junk = np.full_like(x, np.nan)
        junk[:rows] = x[-rows:]
        counted = run(junk, weights, num_rows=jnp.int32(rows))
        alone = run(x[-rows:], weights)
        for part, some, all_rows in zip(alone, counted, whole, strict=True):
            np.testing.assert_array_equal(part, all_rows[-rows:])
            np.testing.assert_array_equal(some[:rows], all_rows[-rows:])


@pytest.mark.parametrize("bits", [4, 8])
def test_the_layout(bits: int) -> None:
    rng = np.random.default_rng(6)
    weight = rng.normal(size=(48, 96)).astype(np.float32)
    matrix = _matrix(weight, bits)
    decoded = _decoded(matrix)
    np.testing.assert_allclose(dequantize(matrix), decoded, rtol=1e-6, atol=1e-6)
    ids = jnp.array([0, 17, 47, 16, 3], jnp.int32)
    np.testing.assert_array_equal(take_rows(matrix, ids), dequantize(matrix)[ids])
    # No weight is off by more than half a step, and what float16 rounds of scale and offset.
    groups = weight.reshape(48, 3, GROUP)
    step = (groups.max(-1) - groups.min(-1)) / (2**bits - 1)
    off = np.abs(decoded - weight).reshape(48, 3, GROUP).max(-1)
    assert (off <= step * 0.51 + np.abs(groups).max(-1) * 2.0**-10).all()


def test_q4_1_survives() -> None:
    """Weights that llama.cpp quantized to Q4_1 lose nothing more in 4 bits."""
    rng = np.random.default_rng(7)
    weight = rng.normal(size=(64, 128)).astype(np.float32)
    kind = gguf.GGMLQuantizationType.Q4_1
    stored = gguf.dequantize(gguf.quantize(weight, kind), kind)
    np.testing.assert_allclose(_decoded(_matrix(stored, 4)), stored, rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("unchecked")
def test_misfits_are_refused(backend: Backend) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        quantized_matmul(jnp.zeros((2, 64)), [_matrix(np.eye(32), 8)], backend=backend)
    with pytest.raises(ValueError, match="no whole panels"):
        quantize(np.zeros((24, 32), np.float32), 8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tiny_and_broken_activations(backend: Backend) -> None:
    x, (weight, *_) = _problem(96, (16,), 8)
    x[0] = 1e-37
    x[2, 40] = np.nan
    x[3, 40] = np.inf
    (y,) = _run(backend)(x, [weight])
    assert (np.asarray(y[0]) == 0).all()
    assert np.isnan(np.asarray(y[2:4])).all()
    assert np.isfinite(np.asarray(y[4:])).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("bits", "size"), [(8, 1e-3), (4, 1e-4)])
def test_scales_too_small_for_a_normal_half(bits: int, size: float, backend: Backend) -> None:
    rng = np.random.default_rng(8)
    x = rng.normal(size=(5, 96)).astype(np.float32)
    weight = _matrix((size * rng.normal(size=(48, 96))).astype(np.float32), bits)
    assert (np.abs(np.asarray(weight.scales[:, :, 0])) < 6.1e-5).any()
    expected = _rounded(x) @ _decoded(weight).T
    (y,) = _run(backend)(x, [weight])
    np.testing.assert_allclose(y, expected, rtol=0, atol=0.02 * np.abs(expected).max())
