"""Matmuls: every backend against float64; rows bitwise alone as among others."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jserve.pallas_kernels.backend import Backend
from jserve.pallas_kernels.matmul.dispatch import matmul, wants_panels
from jserve.pallas_kernels.matmul.panels import PANEL, PanelMatrix, take_rows, to_panels
from tests.backends import BACKENDS, INVARIANT_BACKENDS

# in_dim, out_dims: one matmul and several at once, sizes that no vector or tile divides
SHAPES = [(576, (576, 192, 192)), (1536, (576,)), (90, (211, 66, 22)), (7, (1003,))]
ROWS = (1, 2, 3, 4, 5, 16, 67)


def _run(backend: Backend, weights: list[jax.Array]):
    """The compiled op of these weights [out, in]: a function of x and, optionally, num_rows."""
    laid_out = weights
    if wants_panels(backend):
        panels = [jnp.asarray(to_panels(np.asarray(weight))) for weight in weights]
        laid_out = [PanelMatrix(p, len(w)) for p, w in zip(panels, weights, strict=True)]
    return jax.jit(functools.partial(matmul, weights=laid_out, backend=backend))


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
    for y, weight in zip(_run(backend, weights)(x), weights, strict=True):
        a, b = np.asarray(x, np.float64), np.asarray(weight, np.float64)
        # A tenth of what a float32 sum of as many terms may be off in the worst order.
        bound = (1 + 0.1 * in_dim) * np.finfo(np.float32).eps * (np.abs(a) @ np.abs(b).T)
        assert y.dtype == jnp.float32
        assert (np.abs(np.asarray(y, np.float64) - a @ b.T) <= bound).all()


# On CPU bfloat16 is widened and multiplied as float32 (`test_cpu_dots`), so one shape shows it.
@pytest.mark.optimized
@pytest.mark.parametrize("backend", INVARIANT_BACKENDS)
@pytest.mark.parametrize(
    ("in_dim", "out_dims", "dtype"),
    [
        *((*shape, jnp.float32) for shape in SHAPES if shape != SHAPES[1]),
        (*SHAPES[1], jnp.bfloat16),
        pytest.param(*SHAPES[1], jnp.float32, marks=pytest.mark.sweep),
    ],
)
def test_a_row_does_not_depend_on_the_others(
    in_dim: int, out_dims: tuple[int, ...], dtype: jnp.dtype, backend: Backend
) -> None:
    x, weights = _problem(in_dim, out_dims, dtype)
    run = _run(backend, weights)
    whole = run(x)
    for rows in ROWS:
        for part, all_rows in zip(run(x[-rows:]), whole, strict=True):
            np.testing.assert_array_equal(part, all_rows[-rows:])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("unchecked")
def test_misfits_are_refused(backend: Backend) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        _run(backend, [jnp.zeros((4, 5))])(jnp.zeros((2, 3)))


@pytest.mark.usefixtures("unchecked")
def test_the_other_layout_is_refused() -> None:
    x, weight = jnp.zeros((2, 3)), jnp.zeros((4, 3))
    with pytest.raises(TypeError, match="takes panels: True"):
        matmul(x, [weight], backend=Backend.NATIVE)
    with pytest.raises(TypeError, match="takes panels: False"):
        matmul(x, [PanelMatrix(jnp.zeros((1, 3, PANEL)), 4)], backend=Backend.CPU)


@pytest.mark.parametrize("out_dim", [1, 32, 70])
def test_panels_hold_the_weight_and_zeros(out_dim: int) -> None:
    weight = np.random.default_rng(4).normal(size=(out_dim, 5)).astype(np.float32)
    panels = to_panels(weight)
    for n in range(len(panels) * PANEL):
        expected = weight[n] if n < out_dim else np.zeros(5)
        np.testing.assert_array_equal(panels[n // PANEL, :, n % PANEL], expected)
    rows = np.array([out_dim - 1, 0, out_dim // 2])
    taken = take_rows(PanelMatrix(jnp.asarray(panels), out_dim), jnp.asarray(rows))
    np.testing.assert_array_equal(taken, weight[rows])


@pytest.mark.optimized
@pytest.mark.parametrize("backend", INVARIANT_BACKENDS)
def test_rows_past_the_count_change_nothing(backend: Backend) -> None:
    x, weights = _problem(576, (192, 64), jnp.float32)
    run = _run(backend, weights)
    whole = run(x)
    for rows in (*range(26), 67):  # every height of a tile, alone and after others
        junk = np.array(x)
        junk[rows:] = np.nan
        some = run(jnp.asarray(junk), num_rows=jnp.int32(rows))
        for part, all_rows in zip(some, whole, strict=True):
            np.testing.assert_array_equal(part[:rows], all_rows[:rows])
