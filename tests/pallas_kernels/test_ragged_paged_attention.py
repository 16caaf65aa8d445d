"""Ragged paged attention: every backend against a float64 NumPy reference, memory poisoned."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jserve.pallas_kernels.backend import Backend
from jserve.pallas_kernels.ragged_paged_attention.batch import RaggedBatch
from jserve.pallas_kernels.ragged_paged_attention.cases import CASES, Case
from jserve.pallas_kernels.ragged_paged_attention.dispatch import ragged_paged_attention
from tests.backends import BACKENDS, INVARIANT_BACKENDS, NATIVE_MARKS
from tests.pallas_kernels.attention_problem import Problem


def _packed() -> list[Case]:
    """All cases of the same heads, pages and window as rows of one batch, next to each other."""
    groups: dict[tuple[int, ...], list[Case]] = {}
    for case in CASES:
        sizes = case.q_heads, case.kv_heads, case.head_dim, case.page_size, case.window
        groups.setdefault(sizes, []).append(case)
    return [
        Case(
            "+".join(case.name for case in cases),
            *sizes[:4],
            tuple(done for case in cases for done in case.decode),
            tuple(chunk for case in cases for chunk in case.prompts),
            window=sizes[4],
            idle_rows=max(case.idle_rows for case in cases),
            padding=max(case.padding for case in cases),
        )
        for sizes, cases in groups.items()
    ]


_PACKED = _packed()
# XLA's code converts pages where it loads them, whatever the heads: a few cases show it.
_NARROW_PAGES = ("mixed", "window", "dim_64")


def _is_deep(case: Case, backend: Backend) -> bool:
    """The reference is for readers, and simple: a few cases show that it is right."""
    return backend is Backend.REFERENCE and case.name not in _NARROW_PAGES


@functools.cache
def _compiled(window: int, prompts: bool, backend: Backend):
    return jax.jit(
        functools.partial(ragged_paged_attention, window=window, prompts=prompts, backend=backend)
    )


def _run(problem: Problem, backend: Backend) -> tuple[np.ndarray, np.ndarray, RaggedBatch]:
    q, k, v, pages, batch = problem.arrays()
    run = _compiled(problem.case.window, bool(problem.case.prompts), backend)
    out, pages = run(q, k, v, jnp.asarray(pages), batch)
    return np.asarray(out), np.asarray(pages), batch


@pytest.mark.parametrize(
    ("case", "backend"),
    [
        pytest.param(
            case,
            backend,
            marks=(
                *(NATIVE_MARKS if backend is Backend.NATIVE else ()),
                *((pytest.mark.sweep,) if _is_deep(case, backend) else ()),
            ),
            id=f"{case.name}-{backend}",
        )
        for case in _PACKED
        for backend in (Backend.REFERENCE, Backend.CPU, Backend.NATIVE)
    ],
)
def test_agrees_with_float64(case: Case, backend: Backend) -> None:
    problem = Problem(case)
    out, pages, batch = _run(problem, backend)
    expected = problem.expected()
    np.testing.assert_allclose(out[: len(expected)], expected, atol=2e-6, rtol=1e-5)
    problem.check_pages(pages)
    assert np.isfinite(np.asarray(batch.write_pages)).all()


@pytest.mark.parametrize(
    ("case", "backend"),
    [
        pytest.param(case, backend, marks=NATIVE_MARKS if backend is Backend.NATIVE else ())
        for case in _PACKED
        for backend in (Backend.REFERENCE, Backend.CPU, Backend.NATIVE)
        if case.name in _NARROW_PAGES or backend is Backend.NATIVE
    ],
)
def test_pages_of_bfloat16(case: Case, backend: Backend) -> None:
    """K and V that bfloat16 holds exactly give the same outputs from pages of half the size."""
    problem = Problem(case, seed=1, kv_dtype=jnp.bfloat16)
    q, k, v, pages, batch = problem.arrays()
    run = _compiled(case.window, bool(case.prompts), backend)
    out, pages = run(q, k, v, jnp.asarray(pages, jnp.bfloat16), batch)
    expected = problem.expected()
    assert pages.dtype == jnp.bfloat16
    np.testing.assert_allclose(out[: len(expected)], expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", _NARROW_PAGES)
def test_pages_of_8_bits(name: str, backend: Backend) -> None:
    """Nothing but the rounding of K and V is lost, and what is too large becomes the largest."""
    (case,) = (case for case in CASES if case.name == name)
    problem = Problem(case, seed=2, kv_dtype=jnp.float8_e4m3fn)
    last = problem.kv[-1]
    last[1, -1] = 448.0  # in the pages; the op is given more
    q, k, v, pages, batch = problem.arrays()
    token = sum(new for _, new in problem.rows) - 1
    v = v.at[token].set(1e6)
    run = _compiled(case.window, bool(case.prompts), backend)
    # K and V some times what the pages hold, and queries divided so that scores are the same.
    kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    head = jnp.arange(kv_heads, dtype=jnp.float32)
    of_k, of_v = jnp.exp2(2 * head), jnp.exp2(-1 - head)
    out, pages = run(
        q / jnp.repeat(of_k, group)[None, :, None],
        k * of_k[None, :, None],
        v * of_v[None, :, None],
        jnp.asarray(pages, jnp.float8_e4m3fn),
        batch,
        kv_scales=jnp.stack([of_k, of_v]),
    )
    expected = np.repeat(of_v, group)[None, :, None] * problem.expected()
    assert pages.dtype == jnp.float8_e4m3fn
    np.testing.assert_allclose(out[: len(expected)], expected, atol=8e-6, rtol=1e-5)
    problem.check_pages(np.asarray(pages, np.float32))


@pytest.mark.optimized
@pytest.mark.parametrize("backend", INVARIANT_BACKENDS)
def test_chunks_and_neighbours_do_not_change_a_bit(backend: Backend) -> None:
    """The outputs of one prompt are bitwise the same alone, cut anywhere, and among others."""
    case = Case("whole", 9, 3, 64, 16, (), ((0, 150),))
    whole = Problem(case, seed=3)
    expected, _, _ = _run(whole, backend)
    for cuts in ((1, 149), (64, 86), (33, 60, 57), (149, 1)):
        done, parts = 0, []
        for size in cuts:
            prompts = ((11, 30), (done, size))
            part = Problem(  # always arrays of one size
                Case("part", 9, 3, 64, 16, (7, 40), prompts, padding=150 - size),
                seed=4,
                spare_pages=15 - -(-(done + size) // 16),
            )
            part.kv[3] = whole.kv[0][:, : done + size]
            part.q[3] = whole.q[0][done : done + size]
            for p in range(done):
                page = part.tables[3, p // 16]
                part.pages[page, :, :, p % 16] = part.kv[3][:, p]
            out, _, _ = _run(part, backend)
            parts.append(out[32 : 32 + size])
            done += size
        np.testing.assert_array_equal(np.concatenate(parts), expected)


@pytest.mark.optimized
@pytest.mark.parametrize("backend", INVARIANT_BACKENDS)
def test_decode_rows_do_not_depend_on_the_batch(backend: Backend) -> None:
    """A decode row gives the same bits in a pure decode batch and among prompt chunks."""
    alone = Problem(Case("alone", 9, 3, 64, 16, (200, 90)), seed=5)
    mixed = Problem(Case("mixed", 9, 3, 64, 16, (17, 90, 200, 3), ((5, 60),), padding=4), seed=6)
    for mine, theirs in ((0, 2), (1, 1)):
        mixed.kv[theirs], mixed.q[theirs] = alone.kv[mine], alone.q[mine]
        for p in range(alone.rows[mine][0]):
            mixed.pages[mixed.tables[theirs, p // 16], :, :, p % 16] = alone.kv[mine][:, p]
    first, _, _ = _run(alone, backend)
    second, _, _ = _run(mixed, backend)
    np.testing.assert_array_equal(first[0], second[2])
    np.testing.assert_array_equal(first[1], second[1])


@pytest.mark.usefixtures("unchecked")
def test_misfits_are_refused() -> None:
    q, k, v, pages, batch = Problem(CASES[0]).arrays()
    with pytest.raises(ValueError, match="no multiple"):
        ragged_paged_attention(
            q[:, :3], k, v, pages, batch, window=0, prompts=True, backend=Backend.CPU
        )
    with pytest.raises(ValueError, match="do not hold"):
        ragged_paged_attention(
            q, k, v, pages[:, :, :1], batch, window=0, prompts=True, backend=Backend.CPU
        )
