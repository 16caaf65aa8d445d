"""Gated activations: every backend against float64; tokens past the count change nothing."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jserve.pallas_kernels.backend import Backend
from jserve.pallas_kernels.gated_activation import Activation, gated_activation
from tests.backends import BACKENDS, INVARIANT_BACKENDS


def _run(backend: Backend, activation: Activation):
    return jax.jit(functools.partial(gated_activation, activation=activation, backend=backend))


def _exact(gate: np.ndarray, activation: Activation) -> np.ndarray:
    x = gate.astype(np.float64)
    if activation is Activation.SILU:
        with np.errstate(over="ignore"):
            return x / (1 + np.exp(-x))
    return x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", Activation)
@pytest.mark.parametrize("shape", [(1, 1536), (70, 33), (128, 1536)])
def test_agrees_with_float64(
    shape: tuple[int, int], activation: Activation, backend: Backend
) -> None:
    rng = np.random.default_rng(6)
    gate = (5 * rng.normal(size=shape)).astype(np.float32)
    gate[0, :8] = [0.0, -0.0, 1e-20, 30.0, -30.0, 1e4, -86.5, -1e4]
    up = rng.normal(size=shape).astype(np.float32)
    exact = _exact(gate, activation) * up
    # 1 + tanh cancels for negative gates: an error of a rounding of the gate itself.
    bound = 3e-5 * np.abs(exact) + 2 * np.finfo(np.float32).eps * np.abs(gate * up)
    assert (np.abs(_run(backend, activation)(gate, up) - exact) <= bound).all()
    gate[0, 0] = np.nan
    assert np.isnan(_run(backend, activation)(gate, up)[0, 0])


@pytest.mark.optimized
@pytest.mark.parametrize("backend", INVARIANT_BACKENDS)
@pytest.mark.parametrize("activation", Activation)
def test_tokens_past_the_count_change_nothing(activation: Activation, backend: Backend) -> None:
    rng = np.random.default_rng(7)
    gate, up = (rng.normal(size=(40, 99)).astype(np.float32) for _ in range(2))
    run = _run(backend, activation)
    whole = run(gate, up)
    for count in (0, 1, 17, 40):
        junk = gate.copy()
        junk[count:] = np.nan
        some = run(junk, up, num_tokens=jnp.int32(count))
        np.testing.assert_array_equal(some[:count], whole[:count])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("unchecked")
def test_misfits_are_refused(backend: Backend) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        _run(backend, Activation.SILU)(jnp.zeros((4, 8)), jnp.zeros((4, 1)))
