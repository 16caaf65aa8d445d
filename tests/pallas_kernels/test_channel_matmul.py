"""Matmuls with a scale per output: every backend against float64, kernels by JAX's interpreters.

The interpreter of TPUs fills buffers with NaN, rows that pad the last tile among them.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu

from jserve.pallas_kernels.backend import Backend
from jserve.pallas_kernels.quantized_matmul.cases import CASES, MODEL_CASES, Case
from jserve.pallas_kernels.quantized_matmul.channels import (
    CODES,
    ChannelMatrix,
    channel_codes,
    channel_scales,
    dequantize,
    take_rows,
)
from jserve.pallas_kernels.quantized_matmul.dispatch import has_kernel, quantized_matmul
from jserve.pallas_kernels.quantized_matmul.gpu import make_tiling, num_splits
from jserve.pallas_kernels.quantized_matmul.matrix import QuantizedMatrix, quantize
from jserve.pallas_kernels.quantized_matmul.tpu_blocks import blocks_for
from jserve.pallas_kernels.tpu_generation import OTHER
from tests.pallas_kernels.gpu_interpreter import interpreted, needs_gpu_interpreter

# The C++ kernels read no such weights: there XLA's code runs, as on Backend.CPU.
ALL = [Backend.REFERENCE, Backend.CPU, Backend.TPU]


@contextmanager
def _interpreted(backend: Backend) -> Iterator[None]:
    if backend is Backend.GPU:
        with interpreted():
            yield
        return
    if backend is not Backend.TPU:
        yield
        return
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        yield
    assert interpreter.races is not None
    assert not interpreter.races.races_found


@functools.cache
def _compiled(backend: Backend) -> Callable[..., tuple[jax.Array, ...]]:
    return jax.jit(functools.partial(quantized_matmul, backend=backend))


def _run(
    backend: Backend, x: jax.Array, weights: list[ChannelMatrix], num_rows: int | None = None
) -> list[np.ndarray]:
    with _interpreted(backend):
        rows = None if num_rows is None else jnp.int32(num_rows)
        ys = _compiled(backend)(x, weights, num_rows=rows)
        return [np.asarray(y) for y in ys]


def _matrix(weight: np.ndarray, codes: jnp.dtype) -> ChannelMatrix:
    made = channel_codes(weight, codes), channel_scales(weight, codes)
    return ChannelMatrix(*map(jnp.asarray, made))


def _problem(
    case: Case, codes: jnp.dtype, dtype: jnp.dtype
) -> tuple[jax.Array, list[ChannelMatrix]]:
    rng = np.random.default_rng(1)
    weights = [rng.normal(size=(out, case.in_dim)) for out in case.out_dims]
    x = jnp.asarray(rng.normal(size=(case.rows, case.in_dim)), dtype)
    return x, [_matrix(weight.astype(np.float32), codes) for weight in weights]


@pytest.mark.parametrize(
    ("case", "backend"),
    [
        pytest.param(
            case,
            backend,
            # The interpreter takes seconds: several weights, odd rows and odd outputs show it.
            marks=pytest.mark.sweep
            if backend is Backend.TPU
            and case.name not in ("three_weights", "odd_rows", "odd_outputs")
            else (),
        )
        for case in CASES
        for backend in ALL
    ],
)
def test_agrees_with_float64(case: Case, backend: Backend) -> None:
    """Terms of codes are exact in float32, sums are not: a tenth of the worst they may be off.

    Some of the cases have codes, and rows, of one type, others of the other.
    """
    dtype = jnp.dtype(jnp.float32 if case.name in ("odd_rows", "long") else jnp.bfloat16)
    x, weights = _problem(case, CODES[case.rows % 2], dtype)
    _check(x, weights, backend)


# Weights of one launch, a tall one whose inputs are split, and more rows than a tile has.
_GPU_CASES = (
    Case("three_weights", 5, 256, (256, 128, 128)),
    Case("splits", 12, 1024, (256,)),
    Case("two_tiles", 264, 128, (128,)),
    Case("odd_outputs", 3, 128, (304,)),
)


@needs_gpu_interpreter
@pytest.mark.parametrize("case", _GPU_CASES, ids=lambda case: case.name)
def test_hopper_agrees_with_float64(case: Case) -> None:
    x, weights = _problem(case, CODES[case.rows % 2], jnp.dtype(jnp.bfloat16))
    _check(x, weights, Backend.GPU)


def _check(x: jax.Array, weights: list[ChannelMatrix], backend: Backend) -> None:
    a = np.asarray(x, np.float64)
    for y, weight in zip(_run(backend, x, weights), weights, strict=True):
        b = np.asarray(weight.codes, np.float64) * np.asarray(weight.scales, np.float64)[:, None]
        bound = np.abs(a) @ np.abs(b).T * (2 + 0.1 * x.shape[1]) * np.finfo(np.float32).eps
        assert y.dtype == np.float32
        assert (np.abs(y - a @ b.T) <= bound).all()


@pytest.mark.optimized
@pytest.mark.parametrize("backend", [Backend.CPU, Backend.TPU])
@pytest.mark.parametrize("codes", CODES, ids=str)
def test_a_row_does_not_depend_on_the_others(codes: jnp.dtype, backend: Backend) -> None:
    x, weights = _problem(Case("", 70, 256, (128,)), codes, jnp.dtype(jnp.bfloat16))
    whole = _run(backend, x, weights)
    for rows in (1, 66):
        alone = _run(backend, x[-rows:], weights)
        for part, all_rows in zip(alone, whole, strict=True):
            np.testing.assert_array_equal(part, all_rows[-rows:])
    # The others, in the same tile and in later ones, mean nothing.
    junk = jnp.concatenate((x[4:], jnp.full((74, 256), jnp.nan, x.dtype)))
    for part, all_rows in zip(_run(backend, junk, weights, 66), whole, strict=True):
        np.testing.assert_array_equal(part[:66], all_rows[4:])


@needs_gpu_interpreter
def test_hopper_sums_in_one_order() -> None:
    """One input of a row in 128 is not zero, so that sums show the order of stages and splits.

    What happens inside of a stage is the chip's, and the same for any number of rows.
    """
    x, (weight,) = _problem(Case("", 264, 1024, (128,)), CODES[0], jnp.dtype(jnp.bfloat16))
    x = x * (jnp.arange(1024) % 128 == 77).astype(x.dtype)[None, :]
    splits = num_splits(1024, (128,))
    assert splits == 2
    assert make_tiling(264, 1024, (128,)).in_registers
    assert not make_tiling(1, 1024, (128,)).in_registers
    terms = (
        np.asarray(weight.codes, np.float32)[:, 77::128]
        * np.asarray(x, np.float32)[:, None, 77::128]
    )
    parts = [functools.reduce(np.add, terms[..., at : at + 4].T) for at in (0, 4)]
    expected = (parts[0] + parts[1]).T * np.asarray(weight.scales)[None, :]
    for rows, live in ((1, None), (12, None), (264, 130)):
        (y,) = _run(Backend.GPU, x[-rows:], [weight], live)
        np.testing.assert_array_equal(y[:live], expected[-rows:][:live])


def test_hopper_tilings() -> None:
    """Blocks fit shared memory and registers, and splits depend on the weights alone."""
    for case in MODEL_CASES:
        tiling = make_tiling(case.rows, case.in_dim, case.out_dims)
        assert tiling.rows * tiling.row_tiles >= case.rows
        assert tiling.stages >= 4
        assert tiling.stages * tiling.inputs * (tiling.outputs + 2 * tiling.rows) <= 227 * 1024
        sets = 2 if tiling.in_registers else 1
        assert tiling.outputs * tiling.rows * sets <= 128 * 256  # 128 registers of 256 threads
        assert case.in_dim % (tiling.splits * tiling.inputs) == 0
        assert tiling.splits == make_tiling(1, case.in_dim, case.out_dims).splits
        assert sum(map(tiling.blocks, case.out_dims)) >= 64


@pytest.mark.parametrize("codes", CODES, ids=str)
def test_the_nearest_codes(codes: jnp.dtype) -> None:
    weight = np.random.default_rng(2).normal(size=(40, 300)).astype(np.float32)
    weight[3] = 0.0
    weight[5] *= 1e-30
    matrix = _matrix(weight, codes)
    found, scale = np.asarray(dequantize(matrix)), np.asarray(matrix.scales)[:, None]
    assert matrix.codes.dtype == codes
    assert matrix.scales.dtype == jnp.float32
    # Half a step: of a grid, or of three bits behind the leading one and below 2⁻⁶ of a grid.
    step = scale if codes == jnp.int8 else np.maximum(np.abs(weight) * 2**-3, scale * 2**-9)
    assert (np.abs(found - weight) <= 0.5001 * step).all()
    assert np.abs(np.asarray(matrix.codes, np.float32)).max() in (127, 448)
    rows = jnp.array([39, 0, 3], jnp.int32)
    np.testing.assert_array_equal(take_rows(matrix, rows), found[rows])


def test_which_weights_have_a_kernel() -> None:
    bfloat16, float32 = jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)
    for backend in (Backend.TPU, Backend.GPU):
        for case in MODEL_CASES:
            assert all(has_kernel(backend, out, case.in_dim, bfloat16) for out in case.out_dims)
        assert not has_kernel(backend, 100, 128, bfloat16)
        assert not has_kernel(backend, 128, 96, bfloat16)
    assert has_kernel(Backend.TPU, 128, 128, float32)
    assert not has_kernel(Backend.GPU, 128, 128, float32)
    assert not has_kernel(Backend.CPU, 128, 128, bfloat16)
    x, weights = _problem(Case("", 3, 96, (64,)), CODES[0], jnp.dtype(jnp.float32))
    (y,) = _compiled(Backend.TPU)(x, weights)  # by XLA: no interpreter is needed
    np.testing.assert_allclose(y, _run(Backend.REFERENCE, x, weights)[0], rtol=1e-6)


def test_blocks_divide_and_fit() -> None:
    for generation in ("v5e", "v5p", "v6e", OTHER):
        blocks = blocks_for(generation)
        for case in MODEL_CASES:
            for out in case.out_dims:
                outputs = blocks.outputs(out, case.in_dim)
                assert outputs % 128 == 0
                assert out % outputs == 0 or out % 128
                kib = outputs * case.in_dim // 1024
                assert kib <= max(blocks.weight_block_kib, 128 * case.in_dim // 1024)
    with pytest.raises(ValueError, match="the table has v5e"):
        blocks_for("v99")


@pytest.mark.usefixtures("unchecked")
def test_misfits_are_refused() -> None:
    x, weights = _problem(Case("", 2, 128, (128,)), CODES[0], jnp.dtype(jnp.float32))
    with pytest.raises(ValueError, match="does not fit rows of 64"):
        quantized_matmul(x[:, :64], weights, backend=Backend.REFERENCE)
    groups = QuantizedMatrix(*map(jnp.asarray, quantize(np.eye(128, dtype=np.float32), 8)))
    with pytest.raises(TypeError, match="no weights in groups"):
        quantized_matmul(x, [groups], backend=Backend.TPU)
