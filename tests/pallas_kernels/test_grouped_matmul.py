"""Grouped matmuls: every backend against float64; rows bitwise alone as in company."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jserve.pallas_kernels.backend import Backend
from jserve.pallas_kernels.grouped_matmul import gpu
from jserve.pallas_kernels.grouped_matmul.cases import CASES, MODEL_CASES, TILED_CASES, Case
from jserve.pallas_kernels.grouped_matmul.dispatch import grouped_matmul
from jserve.pallas_kernels.matmul.dispatch import matmul, wants_panels
from jserve.pallas_kernels.matmul.panels import PANEL, PanelMatrix, to_panels
from jserve.pallas_kernels.quantized_matmul.channels import (
    CODES,
    ChannelStack,
    channel_codes,
    channel_scales,
)
from tests.backends import BACKENDS, INVARIANT_BACKENDS
from tests.pallas_kernels.gpu_interpreter import interpreted, needs_gpu_interpreter


def _run(backend: Backend, weights: list[jax.Array]):
    """The compiled op of these stacks [experts, out, in]: a function of x and group sizes."""
    laid_out = weights
    if wants_panels(backend):
        panels = [jnp.asarray(to_panels(np.asarray(weight))) for weight in weights]
        laid_out = [PanelMatrix(p, w.shape[1]) for p, w in zip(panels, weights, strict=True)]

    @jax.jit
    def run(x: jax.Array, group_sizes: jax.Array) -> tuple[jax.Array, ...]:
        return grouped_matmul(x, laid_out, group_sizes, backend=backend)

    return run


@functools.cache
def _problem(case: Case, dtype: jnp.dtype) -> tuple[jax.Array, list[jax.Array], jax.Array]:
    """Rows after the last group hold NaN, as do the weights of experts that have no rows."""
    rng = np.random.default_rng(3)
    sizes = np.array(case.group_sizes, np.int32)
    x = rng.normal(size=(case.rows, case.in_dim))
    x[sum(sizes) :] = np.nan
    weights = [rng.normal(size=(len(sizes), out, case.in_dim)) for out in case.out_dims]
    for weight in weights:
        weight[sizes == 0] = np.nan
    return jnp.asarray(x, dtype), [jnp.asarray(w, dtype) for w in weights], jnp.asarray(sizes)


_TYPED = [  # dtypes and shapes do not meet in any code: bfloat16 in three of the shapes
    *((case, jnp.float32) for case in CASES),
    *((case, jnp.bfloat16) for case in CASES if case.name in ("decode", "odd", "long")),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("case", "dtype"), _TYPED)
def test_agrees_with_float64(case: Case, dtype: jnp.dtype, backend: Backend) -> None:
    _check(case, dtype, backend)


@needs_gpu_interpreter
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=() if case.name == "decode" else pytest.mark.sweep, id=case.name)
        for case in TILED_CASES
    ],
)
def test_hopper_agrees_with_float64(case: Case) -> None:
    with interpreted():
        _check(case, jnp.dtype(jnp.bfloat16), Backend.GPU)


def test_hopper_without_a_kernel_says_so(caplog: pytest.LogCaptureFixture) -> None:
    _check(CASES[1], jnp.dtype(jnp.bfloat16), Backend.GPU)
    assert "have no kernel" in caplog.text


@needs_gpu_interpreter
def test_hopper_sums_in_one_order() -> None:
    """One input of a row in 128 is not zero, so that sums show the order of stages."""
    sizes = (1, 70, 0, 3)
    x, (weight,), group_sizes = _problem(Case("", 512, (128,), sizes), jnp.dtype(jnp.bfloat16))
    x = x * (jnp.arange(512) % 128 == 77).astype(x.dtype)[None, :]
    expert = np.repeat(np.arange(4), sizes)
    a = np.asarray(x, np.float32)[:, 77::128]
    terms = a[:, None] * np.asarray(weight, np.float32)[expert][:, :, 77::128]  # [rows, out, 4]
    expected = functools.reduce(np.add, np.moveaxis(terms, 2, 0))
    with interpreted():
        (whole,) = _run(Backend.GPU, [weight])(x, group_sizes)
        (alone,) = _run(Backend.GPU, [weight])(x[5:6], jnp.array([0, 1, 0, 0], jnp.int32))
        np.testing.assert_array_equal(whole, expected)
        np.testing.assert_array_equal(alone, expected[5:6])


def test_items_are_the_rows_in_order() -> None:
    list_items = jax.jit(gpu.list_items, static_argnums=(1, 2))
    for case in (CASES[1], CASES[3], CASES[4], MODEL_CASES[1]):
        width = gpu.item_rows(case.rows, len(case.group_sizes))
        sizes = jnp.asarray(case.group_sizes, jnp.int32)
        rows = np.concatenate(
            [
                np.stack((np.full(count, expert), np.arange(start, start + count)), axis=1)
                for expert, start, count in np.asarray(list_items(sizes, case.rows, width))
            ]
        )
        experts = np.repeat(np.arange(len(sizes)), case.group_sizes)
        np.testing.assert_array_equal(rows, np.stack((experts, np.arange(len(experts))), axis=1))


def _check(case: Case, dtype: jnp.dtype, backend: Backend) -> None:
    x, weights, sizes = _problem(case, dtype)
    num_rows = sum(case.group_sizes)
    expert = np.repeat(np.arange(len(sizes)), sizes)
    a = np.asarray(x, np.float64)[:num_rows]
    for y, weight in zip(_run(backend, weights)(x, sizes), weights, strict=True):
        b = np.asarray(weight, np.float64)[expert]  # [rows, out, in]
        # A tenth of what a float32 sum of as many terms may be off in the worst order.
        bound = np.einsum("ri,roi->ro", np.abs(a), np.abs(b))
        bound *= (1 + 0.1 * case.in_dim) * np.finfo(np.float32).eps
        assert y.dtype == jnp.float32
        assert y.shape == (case.rows, weight.shape[1])
        defined = np.asarray(y)[:num_rows].astype(np.float64)  # later rows may hold anything
        error = np.abs(defined - np.einsum("ri,roi->ro", a, b))
        assert (error <= bound).all()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_tpu_means_what_the_reference_does(case: Case) -> None:
    """XLA has a ragged dot everywhere; on CPU it reads all weights, so none may be NaN."""
    x, weights, sizes = (jax.tree.map(jnp.nan_to_num, part) for part in _problem(case, jnp.float32))
    num_rows = sum(case.group_sizes)
    expected = _run(Backend.REFERENCE, weights)(x, sizes)
    for y, other in zip(_run(Backend.TPU, weights)(x, sizes), expected, strict=True):
        np.testing.assert_allclose(y[:num_rows], other[:num_rows], rtol=0, atol=1e-3)


@pytest.mark.optimized
@pytest.mark.parametrize("backend", INVARIANT_BACKENDS)
@pytest.mark.parametrize(
    ("in_dim", "dtype"), [(90, jnp.float32), (576, jnp.bfloat16), (1536, jnp.float32)]
)
def test_a_row_does_not_depend_on_the_others(
    in_dim: int, dtype: jnp.dtype, backend: Backend
) -> None:
    """Alone, among rows of its expert, between other experts, whatever the number of all rows."""
    rng = np.random.default_rng(4)
    experts, rows = 4, 150
    x = jnp.asarray(rng.normal(size=(rows, in_dim)), dtype)
    weights = [jnp.asarray(rng.normal(size=(experts, out, in_dim)), dtype) for out in (66, 32)]
    run = _run(backend, weights)
    alone = [  # every row with every expert: [experts, rows, out]
        np.stack([np.asarray(run(x, np.eye(experts, dtype=np.int32)[e] * rows)[i]) for e in (0, 2)])
        for i in range(2)
    ]
    for count in (1, 3, 16, 150):
        sizes = rng.multinomial(count, [0.5, 0.1, 0.4, 0.0]).astype(np.int32)
        which = rng.choice(rows, count, replace=False)
        made = run(x[which], sizes)
        expert = np.repeat(np.arange(experts), sizes)
        for i in range(2):
            for place, e in enumerate((0, 2)):
                np.testing.assert_array_equal(
                    np.asarray(made[i])[expert == e], alone[i][place][which[expert == e]]
                )


@pytest.mark.parametrize("backend", INVARIANT_BACKENDS)
def test_an_expert_is_a_plain_matmul_bitwise(backend: Backend) -> None:
    sizes = (0, 40, 0, 17)
    x, (weight,), group_sizes = _problem(Case("", 96, (64,), sizes), jnp.dtype(jnp.float32))
    (y,) = _run(backend, [weight])(x, group_sizes)
    for expert, first in ((1, 0), (3, 40)):
        plain = own = weight[expert]
        if wants_panels(backend):
            plain = PanelMatrix(jnp.asarray(to_panels(np.asarray(own))), 64)
        rows = slice(first, first + sizes[expert])
        (expected,) = matmul(x[rows], [plain], backend=backend)
        np.testing.assert_array_equal(y[rows], expected)


@pytest.mark.parametrize(
    "backend",
    [*BACKENDS, Backend.TPU, pytest.param(Backend.GPU, marks=needs_gpu_interpreter)],
)
def test_codes_with_a_scale_per_output(backend: Backend) -> None:
    case = Case("", 128, (256, 128), (3, 0, 9, 1), padding=2)
    x, weights, sizes = _problem(case, jnp.dtype(jnp.bfloat16))
    made = []
    for weight in weights:
        floats = np.nan_to_num(np.asarray(weight, np.float32))
        parts = (part(floats, CODES[0]) for part in (channel_codes, channel_scales))
        made.append(ChannelStack(*map(jnp.asarray, parts)))
    x = jnp.nan_to_num(x)
    with interpreted() if backend is Backend.GPU else contextlib.nullcontext():
        ys = jax.jit(functools.partial(grouped_matmul, backend=backend))(x, made, sizes)
        jax.block_until_ready(ys)
    expert = np.repeat(np.arange(4), case.group_sizes)
    for y, stack in zip(ys, made, strict=True):
        floats = np.asarray(stack.codes, np.float64) * np.asarray(stack.scales)[:, :, None]
        expected = np.einsum("ri,roi->ro", np.asarray(x, np.float64)[:13], floats[expert])
        np.testing.assert_allclose(y[:13], expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("unchecked")
def test_misfits_are_refused(backend: Backend) -> None:
    sizes = jnp.zeros(3, jnp.int32)
    with pytest.raises(ValueError, match="do not fit rows of 3"):
        _run(backend, [jnp.zeros((3, 4, 5))])(jnp.zeros((2, 3)), sizes)
    with pytest.raises(ValueError, match="group sizes"):
        _run(backend, [jnp.zeros((2, 4, 3))])(jnp.zeros((2, 3)), sizes)


@pytest.mark.usefixtures("unchecked")
def test_the_other_layout_is_refused() -> None:
    x, weight, sizes = jnp.zeros((2, 3)), jnp.zeros((1, 4, 3)), jnp.zeros(1, jnp.int32)
    with pytest.raises(TypeError, match="takes panels: True"):
        grouped_matmul(x, [weight], sizes, backend=Backend.NATIVE)
    panels = PanelMatrix(jnp.zeros((1, 1, 3, PANEL)), 4)
    with pytest.raises(TypeError, match="takes panels: False"):
        grouped_matmul(x, [panels], sizes, backend=Backend.CPU)
