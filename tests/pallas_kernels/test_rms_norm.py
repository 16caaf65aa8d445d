"""RMS norms: every backend against float64; rows bitwise alone as among others."""

import functools

import jax
import numpy as np
import pytest

from jserve.pallas_kernels.backend import Backend
from jserve.pallas_kernels.rms_norm import rms_norm
from tests.backends import BACKENDS, INVARIANT_BACKENDS

SHAPES = [(16,), (24,), (576,), (4096,), (3, 64), (16, 128), (5, 90)]
_SHOWN = ((576,), (3, 64), (5, 90))  # of rows alone: one norm a token, one a head, odd sizes


def _run(backend: Backend, offset: float = 1.0):
    return jax.jit(functools.partial(rms_norm, eps=1e-5, offset=offset, backend=backend))


def _problem(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(2)
    return (
        rng.normal(size=(256, *shape)).astype(np.float32),
        rng.normal(size=shape[-1]).astype(np.float32),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_float64(shape: tuple[int, ...], offset: float, backend: Backend) -> None:
    x, weight = _problem(shape)
    wide = x.astype(np.float64)
    rms = np.sqrt(np.mean(wide**2, axis=-1, keepdims=True) + 1e-5)
    expected = wide / rms * (offset + weight.astype(np.float64))
    np.testing.assert_allclose(_run(backend, offset)(x, weight), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.optimized
@pytest.mark.parametrize("backend", INVARIANT_BACKENDS)
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param(shape, marks=() if shape in _SHOWN else pytest.mark.sweep, id=str(shape))
        for shape in SHAPES
    ],
)
def test_a_row_does_not_depend_on_the_others(shape: tuple[int, ...], backend: Backend) -> None:
    x, weight = _problem(shape)
    run = _run(backend)
    all_rows = np.asarray(run(x, weight))
    for rows in (1, 2, 7, 8, 32, 100):
        np.testing.assert_array_equal(run(x[-rows:], weight), all_rows[-rows:])
