"""Rotation: every backend against float64 complex numbers; tokens past the count change nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jserve.pallas_kernels.backend import Backend
from jserve.pallas_kernels.rotary import rotary
from tests.backends import BACKENDS, INVARIANT_BACKENDS

SCALE = 0.3
SHAPES = [(9, 3, 64), (4, 1, 256), (2, 2, 6), (3, 1, 90)]  # heads of q and k, dimensions of a head
_SHOWN = ((9, 3, 64), (3, 1, 90))  # of tokens alone: halves that vectors divide, and do not
TOKENS = 70


def _problem(q_heads: int, kv_heads: int, dim: int) -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    angles = rng.uniform(-3, 3, (TOKENS, dim // 2))
    q, k = (rng.normal(size=(TOKENS, heads, dim)) for heads in (q_heads, kv_heads))
    return [array.astype(np.float32) for array in (q, k, np.cos(angles), np.sin(angles))]


def _run(backend: Backend):
    return jax.jit(functools.partial(rotary, q_scale=SCALE, backend=backend))


def _turned(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    half = x.shape[-1] // 2
    wide = x.astype(np.float64)
    turned = (wide[..., :half] + 1j * wide[..., half:]) * (cos + 1j * sin.astype(np.float64))[
        :, None
    ]
    return np.concatenate((turned.real, turned.imag), axis=-1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_agrees_with_complex_numbers(shape: tuple[int, int, int], backend: Backend) -> None:
    q, k, cos, sin = _problem(*shape)
    turned_q, turned_k = _run(backend)(q, k, cos, sin)
    np.testing.assert_allclose(turned_q, SCALE * _turned(q, cos, sin), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(turned_k, _turned(k, cos, sin), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_dtype_is_kept(backend: Backend) -> None:
    q, k, cos, sin = _problem(4, 2, 32)
    half_q, half_k = (jnp.asarray(x, jnp.bfloat16) for x in (q, k))
    turned_q, turned_k = _run(backend)(half_q, half_k, cos, sin)
    assert turned_q.dtype == turned_k.dtype == jnp.bfloat16
    exact = SCALE * _turned(np.asarray(half_q, np.float32), cos, sin)
    np.testing.assert_allclose(np.asarray(turned_q, np.float32), exact, rtol=2**-8, atol=1e-6)


@pytest.mark.optimized
@pytest.mark.parametrize("backend", INVARIANT_BACKENDS)
def test_tokens_past_the_count_change_nothing(backend: Backend) -> None:
    q, k, cos, sin = _problem(9, 3, 64)
    whole = _run(backend)(q, k, cos, sin)
    for count in (0, 1, 21, TOKENS):
        junk = q.copy()
        junk[count:] = np.nan
        some = _run(backend)(junk, k, cos, sin, num_tokens=jnp.int32(count))
        for part, all_tokens in zip(some, whole, strict=True):
            np.testing.assert_array_equal(part[:count], all_tokens[:count])


@pytest.mark.optimized
@pytest.mark.parametrize("backend", INVARIANT_BACKENDS)
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param(shape, marks=() if shape in _SHOWN else pytest.mark.sweep, id=str(shape))
        for shape in (*SHAPES, (4, 2, 16))
    ],
)
def test_a_token_does_not_depend_on_the_others(
    shape: tuple[int, int, int], backend: Backend
) -> None:
    problem = _problem(*shape)
    whole = _run(backend)(*problem)
    for count in (1, 2, 3, 4, 7, 8, 33):
        some = _run(backend)(*(array[:count] for array in problem))
        for part, all_tokens in zip(some, whole, strict=True):
            np.testing.assert_array_equal(part, all_tokens[:count])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("unchecked")
def test_misfits_are_refused(backend: Backend) -> None:
    q, k, cos, sin = _problem(4, 2, 32)
    for wrong in ((q, k[:5], cos, sin), (q, k, cos[:1], sin[:1]), (q[..., :31], k, cos, sin)):
        with pytest.raises(ValueError, match="do not fit"):
            _run(backend)(*wrong)
