"""Ragged paged attention of Pallas for TPU, run by JAX's TPU interpreter with its race detector.

The interpreter fills buffers with NaN, carries out a copy no sooner than it is waited for, and
refuses to read out of bounds. It cannot show that the kernel is accepted
for the real chips; `tests/tpu_compile` does.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu

from jserve.pallas_kernels.backend import Backend, backend_for
from jserve.pallas_kernels.ragged_paged_attention import tpu
from jserve.pallas_kernels.ragged_paged_attention.cases import CASES, Case
from jserve.pallas_kernels.ragged_paged_attention.dispatch import ragged_paged_attention
from jserve.pallas_kernels.ragged_paged_attention.tpu_blocks import blocks_for
from jserve.pallas_kernels.tpu_generation import OTHER, generation_in_use
from tests.pallas_kernels.attention_problem import Problem


@functools.cache
def _compiled(window: int, prompts: bool):
    return jax.jit(
        functools.partial(
            ragged_paged_attention, window=window, prompts=prompts, backend=Backend.TPU
        )
    )


def _run(problem: Problem, dtype: jnp.dtype, kv_dtype: jnp.dtype) -> tuple[np.ndarray, np.ndarray]:
    q, k, v, pages, batch = problem.arrays()
    run = _compiled(problem.case.window, bool(problem.case.prompts))
    q, k, v = (part.astype(dtype) for part in (q, k, v))
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        out, pages = run(q, k, v, jnp.asarray(pages, kv_dtype), batch)
        out.block_until_ready()
    assert interpreter.races is not None
    assert not interpreter.races.races_found
    assert np.isfinite(out).all()
    return np.asarray(out, np.float32), np.asarray(pages, np.float32)


def _check(problem: Problem, out: np.ndarray, pages: np.ndarray, atol: float) -> None:
    owned, expected = problem.owned(), problem.expected()
    assert (out[len(owned) :] == 0).all()
    np.testing.assert_allclose(out[: len(owned)][owned], expected[owned], atol=atol, rtol=1e-5)
    problem.check_pages(pages)


# The interpreter takes seconds for each case. The random batches have both routines, a window, idle
# rows, padding, and tiles that hang over into other rows.
@pytest.mark.sweep
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_agrees_with_float64(case: Case) -> None:
    # The bound of every backend: roundings of float32 sums over some hundred weighted values.
    problem = Problem(case)
    _check(problem, *_run(problem, jnp.float32, jnp.float32), atol=2e-6)


@pytest.mark.parametrize(
    "name",
    [
        "dim_128",
        *(
            pytest.param(name, marks=pytest.mark.sweep)
            for name in ("short_prompts", "dim_64", "dim_256")
        ),
    ],
)
def test_bfloat16(name: str) -> None:
    """Weights are rounded to bfloat16 before they meet V, and so is the result: 2⁻⁹ each."""
    (case,) = (case for case in CASES if case.name == name)
    problem = Problem(case, seed=1, kv_dtype=jnp.bfloat16)
    problem.q = [q.astype(jnp.bfloat16).astype(np.float32) for q in problem.q]
    largest = max(np.abs(kv[1]).max() for kv in problem.kv)
    _check(problem, *_run(problem, jnp.bfloat16, jnp.bfloat16), atol=2**-8 * largest)


@pytest.mark.sweep
@pytest.mark.parametrize("name", ["mixed", "wide_page", "wider_page"])
def test_pages_of_bfloat16(name: str) -> None:
    """Float32 queries over K and V that bfloat16 holds exactly lose nothing."""
    (case,) = (case for case in CASES if case.name == name)
    problem = Problem(case, seed=1, kv_dtype=jnp.bfloat16)
    _check(problem, *_run(problem, jnp.float32, jnp.bfloat16), atol=2e-6)


def test_pages_of_8_bits() -> None:
    """Queries of bfloat16 over K and V that 8 bits hold exactly lose nothing more."""
    (case,) = (case for case in CASES if case.name == "dim_64")
    problem = Problem(case, seed=2, kv_dtype=jnp.float8_e4m3fn)
    problem.q = [q.astype(jnp.bfloat16).astype(np.float32) for q in problem.q]
    largest = max(np.abs(kv[1]).max() for kv in problem.kv)
    _check(problem, *_run(problem, jnp.bfloat16, jnp.float8_e4m3fn), atol=2**-8 * largest)


_ROWS, _TOKENS, _PAGES = 6, 160, 240


@st.composite
def _batches(
    draw: st.DrawFn, window: int, page_size: int
) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]:
    """Rows that start and end anywhere, idle ones among them, always in arrays of one size."""
    decode = draw(st.lists(st.integers(0, 300), max_size=3))
    chunk = st.tuples(st.integers(0, 270), st.one_of(st.integers(1, 50), st.just(16)))
    prompts = draw(st.lists(chunk, min_size=1, max_size=3))
    num_rows = len(decode) + len(prompts)
    rows = ("random", 4, 2, 32, page_size, tuple(decode), tuple(prompts))
    sizes = {
        "window": window,
        "idle_rows": _ROWS - num_rows,
        "padding": _TOKENS - len(decode) - sum(new for _, new in prompts),
    }
    pages = sum(-(-(done + 1) // page_size) for done in decode)
    pages += sum(-(-(done + new) // page_size) for done, new in prompts)
    idle = frozenset(draw(st.sets(st.integers(0, num_rows - 1), max_size=2)))
    return (
        rows,
        sizes,
        {
            "seed": draw(st.integers(0, 99)),
            "idle": idle,
            "spare_pages": _PAGES - pages,
        },
    )


@pytest.mark.parametrize(("window", "page_size"), [(0, 8), (40, 32)])
@settings(max_examples=3)
@given(data=st.data())
def test_random_batches(window: int, page_size: int, data: st.DataObject) -> None:
    rows, sizes, memory = data.draw(_batches(window, page_size))
    # A `Case` is made here, for types are checked by random samples.
    problem = Problem(Case(*rows, **sizes), **memory)
    _check(problem, *_run(problem, jnp.float32, jnp.float32), atol=2e-6)


def test_chunks_and_neighbours_do_not_change_a_bit() -> None:
    def around(done: int, size: int, seed: int) -> Problem:  # always arrays of one size
        prompts = ((11, 30), (done, size))
        case = Case("part", 4, 2, 64, 128, (7, 40), prompts, padding=150 - size)
        return Problem(case, seed=seed, spare_pages=6 - (done + size > 128))

    whole = around(0, 150, seed=3)
    expected = _run(whole, jnp.float32, jnp.float32)[0][32:182]
    done, parts = 0, []
    for size in (61, 89):
        part = around(done, size, seed=4)
        part.kv[3] = whole.kv[3][:, : done + size]
        part.q[3] = whole.q[3][done : done + size]
        for p in range(done):
            part.pages[part.tables[3, p // 128], :, :, p % 128] = part.kv[3][:, p]
        out, _ = _run(part, jnp.float32, jnp.float32)
        parts.append(out[32 : 32 + size])
        done += size
    np.testing.assert_array_equal(np.concatenate(parts), expected)


def test_a_tpu_is_served_by_this_kernel() -> None:
    assert backend_for("tpu", jnp.dtype(jnp.bfloat16), 4, device_kind="TPU v6 lite") is Backend.TPU


def test_blocks_are_whole_pages_and_fit() -> None:
    assert generation_in_use() == OTHER  # there is no TPU here, and no mesh of one
    for generation in ("v5e", "v5p", "v6e", OTHER):
        blocks = blocks_for(generation)
        assert blocks.kv_buffers_mib < blocks.vmem_limit_mib
        for page_size in (16, 64, 128, 256):
            tokens = blocks.kv_tokens(page_size, 8, 128, 2)
            assert tokens % page_size == 0
            assert 4 * tokens * 8 * 128 * 2 <= blocks.kv_buffers_mib * 2**20
    with pytest.raises(ValueError, match="the table has v5e"):
        blocks_for("v99")


@pytest.mark.usefixtures("unchecked")
def test_what_does_not_fit_is_refused() -> None:
    q, k, v, pages, batch = Problem(CASES[0]).arrays()
    attend = functools.partial(tpu.ragged_paged_attention, window=0, prompts=True)
    with pytest.raises(ValueError, match="no multiple of 8"):
        attend(q, k, v, pages[:, :, :, :12], batch)
    wide = (jnp.tile(part, (1, 1, 12)) for part in (q, k, v))
    with pytest.raises(ValueError, match="above 128"):
        attend(*wide, np.tile(pages, 12), batch)
    large = batch._replace(page_table=jnp.zeros((512, 512), jnp.int32))
    with pytest.raises(ValueError, match="too large for scalar memory"):
        attend(q, k, v, pages, large)
