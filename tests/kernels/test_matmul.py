"""Matrix products: every backend against float64; rows bitwise alone as among others."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jserve.pallas_kernels.backend import Backend
from jserve.pallas_kernels.matmul.dispatch import matmul
from tests.backends import BACKENDS, INVARIANT_BACKENDS

# in_dim, out_dims: one product and several at once, sizes that no vector or tile divides
SHAPES = [(576, (576, 192, 192)), (1536, (576,)), (90, (211, 66, 22)), (7, (1003,))]
ROWS = (1, 2, 3, 4, 5, 16, 67)


def _run(backend: Backend):
    return jax.jit(functools.partial(matmul, backend=backend))


def _problem(
    in_dim: int, out_dims: tuple[int, ...], dtype: jnp.dtype
) -> tuple[jax.Array, list[jax.Array]]:
    rng = np.random.default_rng(3)
    x = jnp.asarray(rng.normal(size=(max(ROWS), in_dim)), dtype)
    return x, [jnp.asarray(rng.normal(size=(out, in_dim)), dtype) for out in out_dims]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("in_dim", "out_dims"), SHAPES)
def test_agrees_with_float64(
    in_dim: int, out_dims: tuple[int, ...], dtype: jnp.dtype, backend: Backend
) -> None:
    x, weights = _problem(in_dim, out_dims, dtype)
    for y, weight in zip(_run(backend)(x, weights), weights, strict=True):
        a, b = np.asarray(x, np.float64), np.asarray(weight, np.float64)
        # A tenth of what a float32 sum of so many products may be off in the worst order.
        bound = (1 + 0.1 * in_dim) * np.finfo(np.float32).eps * (np.abs(a) @ np.abs(b).T)
        assert y.dtype == jnp.float32
        assert (np.abs(np.asarray(y, np.float64) - a @ b.T) <= bound).all()


@pytest.mark.parametrize("backend", INVARIANT_BACKENDS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("in_dim", "out_dims"), SHAPES)
def test_a_row_does_not_depend_on_the_others(
    in_dim: int, out_dims: tuple[int, ...], dtype: jnp.dtype, backend: Backend
) -> None:
    x, weights = _problem(in_dim, out_dims, dtype)
    run = _run(backend)
    whole = run(x, weights)
    for rows in ROWS:
        for part, all_rows in zip(run(x[-rows:], weights), whole, strict=True):
            np.testing.assert_array_equal(part, all_rows[-rows:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_misfits_are_refused(backend: Backend) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        matmul(jnp.zeros((2, 3)), [jnp.zeros((4, 5))], backend=backend)


@pytest.mark.parametrize("backend", INVARIANT_BACKENDS)
def test_rows_past_the_count_change_nothing(backend: Backend) -> None:
    x, weights = _problem(576, (192, 64), jnp.float32)
    whole = _run(backend)(x, weights)
    for rows in (0, 1, 5, 16, 67):
        junk = x.at[rows:].set(jnp.nan)
        some = jax.jit(functools.partial(matmul, backend=backend))(
            junk, weights, num_rows=jnp.int32(rows)
        )
        for part, all_rows in zip(some, whole, strict=True):
            np.testing.assert_array_equal(part[:rows], all_rows[:rows])
