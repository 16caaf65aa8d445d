"""Ragged paged attention of Mosaic GPU, run by JAX's GPU interpreter with its race detector.

Thread blocks, warpgroups and barriers behave as on a GPU, and memory that was never written is
NaN. What it cannot show, `make gpu-compile` does: that the kernel is accepted for a real chip.
NumPy multiplies for the tensor cores here; only their operands are rounded.
"""

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jserve.pallas_kernels.backend import (
    GPU_HEAD_DIMS,
    GPU_PAGE_SIZES,
    Backend,
    backend_for,
)
from jserve.pallas_kernels.ragged_paged_attention import gpu
from jserve.pallas_kernels.ragged_paged_attention.cases import CASES, Case
from jserve.pallas_kernels.ragged_paged_attention.dispatch import ragged_paged_attention
from jserve.pallas_kernels.ragged_paged_attention.gpu_blocks import (
    blocks_for,
    blocks_in_use,
    blocks_on,
)
from jserve.pallas_kernels.ragged_paged_attention.gpu_items import count_visits
from jserve.pallas_kernels.ragged_paged_attention.gpu_memory import make_shape
from tests.pallas_kernels.attention_problem import Problem
from tests.pallas_kernels.gpu_interpreter import interpreted, needs_gpu_interpreter

# The interpreter takes a second for a block of K and V: few rows, all edges.
_CASES = (
    # Contexts that end at, before and after a block and a split of 128 tokens.
    Case("decode", 4, 2, 64, 64, (0, 63, 64, 127, 300), idle_rows=1),
    # Chunks that start inside a block, at one, and with a page's last token.
    Case("mixed", 6, 2, 64, 128, (130,), ((0, 45), (70, 30), (127, 2)), padding=3),
    Case("window", 4, 2, 128, 64, (5, 200), ((100, 40),), window=50),
    Case("narrow_256", 2, 1, 256, 64, (63,), ((30, 40),)),
    # The cases of every backend that this one takes.
    *(
        case
        for case in CASES
        if case.head_dim in GPU_HEAD_DIMS and case.page_size in GPU_PAGE_SIZES
    ),
)
_MORE = (
    Case("mha", 3, 3, 64, 64, (9, 150), ((60, 20),)),
    Case("mqa", 16, 1, 128, 128, (127, 256), ((3, 20),)),
    Case("prompts", 8, 2, 64, 64, (), ((0, 100), (64, 64), (63, 3)), padding=1),
    Case("window_over_blocks", 4, 2, 64, 64, (400,), ((150, 70),), window=130),
    Case("wide_page", 4, 1, 128, 128, (255, 256, 257), ((100, 60),)),
    Case("dim_256_window", 4, 2, 256, 128, (300,), ((100, 60),), window=100),
    Case("dim_256_odd_group", 3, 1, 256, 64, (70,), ((60, 20),)),
)


@functools.cache
def _compiled(window: int, prompts: bool):
    return jax.jit(
        functools.partial(
            ragged_paged_attention, window=window, prompts=prompts, backend=Backend.GPU
        )
    )


def _problem(case: Case, seed: int, kv_dtype: jnp.dtype = jnp.bfloat16, **others: Any) -> Problem:
    problem = Problem(case, seed=seed, kv_dtype=kv_dtype, **others)
    problem.q = [q.astype(jnp.bfloat16).astype(np.float32) for q in problem.q]
    return problem


def _run(
    problem: Problem, kv_dtype: jnp.dtype = jnp.bfloat16, *, prompts: bool | None = None
) -> tuple[np.ndarray, np.ndarray]:
    q, k, v, pages, batch = problem.arrays()
    run = _compiled(problem.case.window, bool(problem.case.prompts) if prompts is None else prompts)
    q, k, v = (part.astype(jnp.bfloat16) for part in (q, k, v))
    with interpreted():
        out, pages = run(q, k, v, jnp.asarray(pages, kv_dtype), batch)
        out.block_until_ready()
    assert np.isfinite(np.asarray(out, np.float32)).all()
    return np.asarray(out, np.float32), np.asarray(pages, np.float32)


def _check(problem: Problem, out: np.ndarray, pages: np.ndarray) -> None:
    """Weights are rounded to bfloat16 before they meet V, and so is the result: 2⁻⁹ each."""
    owned, expected = problem.owned(), problem.expected()
    assert (out[len(owned) :] == 0).all()
    largest = max(np.abs(kv[1]).max() for kv in problem.kv)
    np.testing.assert_allclose(
        out[: len(owned)][owned], expected[owned], atol=2**-8 * largest, rtol=1e-5
    )
    problem.check_pages(pages)


# Chunks that start inside of blocks are in the random batches and among the chunks below.
_SHOWN = ("window",)


@needs_gpu_interpreter
@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=() if case.name in _SHOWN else pytest.mark.sweep, id=case.name)
        for case in _CASES
    ],
)
def test_agrees_with_float64(case: Case) -> None:
    problem = _problem(case, seed=1)
    _check(problem, *_run(problem))


@needs_gpu_interpreter
def test_pages_of_fp8() -> None:
    """K and V that float8_e4m3fn holds exactly lose nothing more than in bfloat16."""
    problem = _problem(
        Case("fp8", 2, 1, 128, 64, (63, 200), ((100, 34),)), 1, kv_dtype=jnp.float8_e4m3fn
    )
    _check(problem, *_run(problem, jnp.float8_e4m3fn))


@needs_gpu_interpreter
@pytest.mark.sweep
@pytest.mark.parametrize(
    "case",
    [case for case in _MORE if case.kv_heads * case.head_dim % 128 == 0],
    ids=lambda case: case.name,
)
def test_pages_of_fp8_in_more_cases(case: Case) -> None:
    problem = _problem(case, 3, kv_dtype=jnp.float8_e4m3fn)
    _check(problem, *_run(problem, jnp.float8_e4m3fn))


@needs_gpu_interpreter
@pytest.mark.sweep
@pytest.mark.parametrize("case", _MORE, ids=lambda case: case.name)
def test_agrees_with_float64_in_more_cases(case: Case) -> None:
    problem = _problem(case, seed=2)
    _check(problem, *_run(problem))


_ROWS, _TOKENS, _PAGES = 5, 60, 30


@st.composite
def _batches(draw: st.DrawFn) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]:
    """Rows that start and end anywhere, idle ones among them, always in arrays of one size."""
    decode = draw(st.lists(st.integers(0, 200), max_size=2))
    chunk = st.tuples(st.integers(0, 130), st.one_of(st.integers(1, 20), st.just(16)))
    prompts = draw(st.lists(chunk, min_size=1, max_size=2))
    num_rows = len(decode) + len(prompts)
    rows = ("random", 4, 2, 64, 64, tuple(decode), tuple(prompts))
    sizes = {
        "idle_rows": _ROWS - num_rows,
        "padding": _TOKENS - len(decode) - sum(new for _, new in prompts),
    }
    pages = sum(-(-(done + 1) // 64) for done in decode)
    pages += sum(-(-(done + new) // 64) for done, new in prompts)
    idle = frozenset(draw(st.sets(st.integers(0, num_rows - 1), max_size=2)))
    seed = draw(st.integers(0, 99))
    return rows, sizes, {"seed": seed, "idle": idle, "spare_pages": _PAGES - pages}


@needs_gpu_interpreter
@settings(max_examples=3)
@given(_batches())
def test_random_batches(batch: tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]) -> None:
    rows, sizes, memory = batch  # a `Case` is made here, for types are checked by random samples
    problem = _problem(Case(*rows, **sizes), **memory)
    _check(problem, *_run(problem))


@needs_gpu_interpreter
def test_chunks_and_neighbours_do_not_change_a_bit() -> None:
    def around(done: int, size: int, seed: int) -> Problem:  # always arrays of one size
        prompts = ((11, 12), (done, size))
        case = Case("chunk", 2, 1, 64, 64, (40,), prompts, padding=75 - size)
        return _problem(case, seed, spare_pages=6 - (done + size > 64))

    whole = around(0, 75, seed=3)
    expected = _run(whole)[0][13:88]
    done, parts = 0, []
    for size in (29, 46):
        part = around(done, size, seed=4 + done)
        part.kv[2] = whole.kv[2][:, : done + size]
        part.q[2] = whole.q[2][done : done + size]
        for p in range(done):
            part.pages[part.tables[2, p // 64], :, :, p % 64] = part.kv[2][:, p]
        out, _ = _run(part)
        parts.append(out[13 : 13 + size])
        done += size
    np.testing.assert_array_equal(np.concatenate(parts), expected)


@needs_gpu_interpreter
@pytest.mark.sweep  # chunks and their neighbours, above, go through the same two routines
def test_decode_rows_are_the_same_in_a_window_and_in_a_mixed_step() -> None:
    case = Case("mixed", 4, 2, 64, 64, (40, 200), ((11, 20),), idle_rows=2, padding=38)
    mixed = _problem(case, seed=5, spare_pages=_PAGES - 6)  # arrays as those of random batches
    alone = _problem(Case("alone", 4, 2, 64, 64, (9, 200)), seed=6)
    alone.kv[1], alone.q[1] = mixed.kv[1], mixed.q[1]
    for p in range(200):
        alone.pages[alone.tables[1, p // 64], :, :, p % 64] = alone.kv[1][:, p]
    np.testing.assert_array_equal(_run(alone)[0][1], _run(mixed)[0][1])


def test_a_hopper_is_served_by_this_kernel(caplog: pytest.LogCaptureFixture) -> None:
    bfloat16 = jnp.dtype(jnp.bfloat16)
    for platform in ("gpu", "cuda"):
        for kind in ("NVIDIA H200", "NVIDIA H100 80GB HBM3"):
            assert backend_for(platform, bfloat16, 4, device_kind=kind) is Backend.GPU
    sizes = (("H100 PCIe", 114), ("H800", 132), ("H20", 78), ("H200", 132), ("GH200 480GB", 132))
    for name, blocks in sizes:
        kind = f"NVIDIA {name}"
        assert backend_for("gpu", bfloat16, device_kind=kind) is Backend.GPU
        assert blocks_on("gpu", kind).thread_blocks == blocks
        assert blocks_on("gpu", kind, 99).thread_blocks == 99
        assert blocks_on("gpu", kind).head_dims == blocks_for("hopper").head_dims
    with pytest.raises(ValueError, match="NVIDIA A100"):
        blocks_on("gpu", "NVIDIA A100")
    with caplog.at_level(logging.WARNING):
        ampere = backend_for("gpu", jnp.dtype(jnp.float32), device_kind="NVIDIA A100", head_dim=96)
    assert ampere is Backend.CPU
    for word in ("Hopper", "float32", "head_dim 96"):
        assert word in caplog.text


def test_shared_memory_holds_every_shape() -> None:
    _, _, _, _, batch = Problem(_CASES[0]).arrays()
    for head_dim, heads in ((64, 8), (64, 3), (128, 8), (128, 32), (256, 8)):
        for page_size in (64, 128):
            q = jax.ShapeDtypeStruct((64, 4 * heads, head_dim), jnp.bfloat16)
            pages = jax.ShapeDtypeStruct((9, 2, heads, page_size, head_dim), jnp.bfloat16)
            shape = make_shape(q, pages, batch, 0, blocks_for("hopper"))
            assert shape.stages >= 2


def test_each_split_is_visited_once_and_no_thread_block_idles_for_want_of_one() -> None:
    for prompts, splits, visits in ((0, 0, 0), (0, 16, 16), (0, 150, 132), (0, 301, 151)):
        counts = count_visits(jnp.int32(prompts), jnp.int32(splits), 132)
        assert counts.tolist() == [prompts, splits, visits, splits - visits]
    assert count_visits(jnp.int32(130), jnp.int32(9), 132).tolist() == [130, 9, 5, 4]
    assert count_visits(jnp.int32(128), jnp.int32(5), 132).tolist() == [128, 5, 4, 1]


@pytest.mark.usefixtures("unchecked")
def test_what_does_not_fit_is_refused() -> None:
    q, k, v, pages, batch = Problem(_CASES[0]).arrays()
    attend = functools.partial(gpu.ragged_paged_attention, window=0, prompts=False)
    with pytest.raises(ValueError, match="queries are float32"):
        attend(q, k, v, pages, batch)
    q = q.astype(jnp.bfloat16)
    with pytest.raises(ValueError, match="pages are float32"):
        attend(q, k, v, pages, batch)
    with pytest.raises(ValueError, match="64 bytes"):
        attend(q[:, :2], k[:, :1], v[:, :1], pages[:, :, :1].astype(jnp.float8_e4m3fn), batch)
    with pytest.raises(ValueError, match="page_size 32"):
        attend(q, k, v, pages[:, :, :, :32], batch)
    with pytest.raises(ValueError, match="head_dim 32"):
        attend(q[:, :, :32], k, v, pages[..., :32], batch)
    with pytest.raises(ValueError, match="no GPU kind 'gpu'"):
        attend(q, k, v, pages, batch, kind="gpu")
    assert blocks_in_use() == blocks_for("other")
