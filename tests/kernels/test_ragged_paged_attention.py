"""Ragged paged attention: every backend against a float64 NumPy reference, memory poisoned."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jserve.pallas_kernels.backend import Backend
from jserve.pallas_kernels.ragged_paged_attention.batch import RaggedBatch, make_ragged_batch
from jserve.pallas_kernels.ragged_paged_attention.cases import CASES, Case
from jserve.pallas_kernels.ragged_paged_attention.dispatch import (
    kv_pages_shape,
    ragged_paged_attention,
)
from tests.backends import BACKENDS, INVARIANT_BACKENDS


class Problem:
    """One case with its memory: contexts in scattered pages, everything unused is NaN."""

    def __init__(self, case: Case, seed: int = 0, kv_dtype: jnp.dtype = jnp.float32) -> None:
        self.case = case
        self.rows = [(done, 1) for done in case.decode] + list(case.prompts)
        rng = np.random.default_rng(seed)
        self.kv = [  # [K|V, tokens, kv_heads, head_dim] of the whole row
            rng.normal(size=(2, done + new, case.kv_heads, case.head_dim))
            .astype(kv_dtype)
            .astype(np.float32)
            for done, new in self.rows
        ]
        self.q = [
            rng.normal(size=(new, case.q_heads, case.head_dim), scale=case.head_dim**-0.5).astype(
                np.float32
            )
            for _, new in self.rows
        ]
        counts = [-(-kv.shape[1] // case.page_size) for kv in self.kv]
        # A table is as wide as the context may grow, in whole blocks.
        self.width = max(512 // case.page_size, max(counts))
        num_pages = sum(counts) + 5
        free = list(rng.permutation(np.arange(1, num_pages + 1)))
        self.tables = np.zeros((len(self.rows) + case.idle_rows, self.width), np.int32)
        shape = kv_pages_shape(num_pages, case.page_size, case.kv_heads, case.head_dim)
        self.pages = np.full(shape, np.nan, np.float32)
        for r, (done, _) in enumerate(self.rows):
            for i in range(counts[r]):
                self.tables[r, i] = free.pop()
            for p in range(done):
                page = self.tables[r, p // case.page_size]
                self.pages[page, :, :, p % case.page_size] = self.kv[r][:, p]

    def arrays(self) -> tuple:
        """Arguments of the op."""
        case, rows = self.case, self.rows
        total = sum(new for _, new in rows) + case.padding
        num = len(rows) + case.idle_rows
        kv_lens, q_lens, q_starts = (np.zeros(num, np.int32) for _ in range(3))
        token_rows, positions = np.zeros(total, np.int32), np.zeros(total, np.int32)
        live = np.zeros(total, bool)
        q = np.full((total, case.q_heads, case.head_dim), 3.0, np.float32)
        kv = np.full((2, total, case.kv_heads, case.head_dim), 5.0, np.float32)
        at = 0
        for r, (done, new) in enumerate(rows):
            kv_lens[r], q_lens[r], q_starts[r] = done + new, new, at
            here = slice(at, at + new)
            token_rows[here], live[here] = r, True
            positions[here] = np.arange(done, done + new)
            q[here], kv[:, here] = self.q[r], self.kv[r][:, done:]
            at += new
        batch = make_ragged_batch(
            jnp.asarray(self.tables),
            jnp.asarray(kv_lens),
            jnp.asarray(q_starts),
            jnp.asarray(q_lens),
            jnp.int32(len(case.decode)),
            jnp.int32(len(rows)),
            jnp.asarray(token_rows),
            jnp.asarray(positions),
            jnp.asarray(live),
            page_size=case.page_size,
        )
        return jnp.asarray(q), jnp.asarray(kv[0]), jnp.asarray(kv[1]), self.pages, batch

    def expected(self) -> np.ndarray:
        """Float64 attention, row after row: [tokens, q_heads, head_dim]."""
        outs = []
        for (done, new), q, kv in zip(self.rows, self.q, self.kv, strict=True):
            group = self.case.q_heads // self.case.kv_heads
            keys, values = np.repeat(kv.astype(np.float64), group, axis=2)
            for t in range(new):
                end = done + t + 1
                start = max(end - self.case.window, 0) if self.case.window else 0
                scores = np.einsum("hd,thd->ht", q[t].astype(np.float64), keys[start:end])
                weights = np.exp(scores - scores.max(axis=1, keepdims=True))
                weights /= weights.sum(axis=1, keepdims=True)
                outs.append(np.einsum("ht,thd->hd", weights, values[start:end]))
        return np.array(outs)


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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_agrees_with_float64(case: Case, backend: Backend) -> None:
    problem = Problem(case)
    out, pages, batch = _run(problem, backend)
    expected = problem.expected()
    np.testing.assert_allclose(out[: len(expected)], expected, atol=2e-6, rtol=1e-5)
    # Every token's K and V stand where the table says; no other page but the null page changed.
    for r, kv in enumerate(problem.kv):
        for p in range(kv.shape[1]):
            page = problem.tables[r, p // case.page_size]
            stored = pages[page, :, :, p % case.page_size]
            np.testing.assert_array_equal(stored, kv[:, p])
    untouched = np.setdiff1d(np.arange(1, len(pages)), problem.tables)
    assert np.isnan(pages[untouched]).all()
    assert np.isfinite(np.asarray(batch.write_pages)).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_pages_of_bfloat16(case: Case, backend: Backend) -> None:
    """K and V that bfloat16 holds exactly give the same outputs from pages of half the size."""
    problem = Problem(case, seed=1, kv_dtype=jnp.bfloat16)
    q, k, v, pages, batch = problem.arrays()
    run = _compiled(case.window, bool(case.prompts), backend)
    out, pages = run(q, k, v, jnp.asarray(pages, jnp.bfloat16), batch)
    expected = problem.expected()
    assert pages.dtype == jnp.bfloat16
    np.testing.assert_allclose(out[: len(expected)], expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("backend", INVARIANT_BACKENDS)
def test_chunks_and_neighbours_do_not_change_a_bit(backend: Backend) -> None:
    """The outputs of one prompt are bitwise the same alone, cut anywhere, and among others."""
    case = Case("whole", 9, 3, 64, 16, (), ((0, 150),))
    whole = Problem(case, seed=3)
    expected, _, _ = _run(whole, backend)
    for cuts in ((1, 149), (64, 86), (33, 60, 57), (149, 1)):
        done, parts = 0, []
        for size in cuts:
            part = Problem(Case("part", 9, 3, 64, 16, (7, 40), ((11, 30), (done, size))), seed=4)
            part.kv[3] = whole.kv[0][:, : done + size]
            part.q[3] = whole.q[0][done : done + size]
            for p in range(done):
                page = part.tables[3, p // 16]
                part.pages[page, :, :, p % 16] = part.kv[3][:, p]
            out, _, _ = _run(part, backend)
            parts.append(out[32 : 32 + size])
            done += size
        np.testing.assert_array_equal(np.concatenate(parts), expected)


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
