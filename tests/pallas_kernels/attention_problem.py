"""One ragged batch with its memory, and its results by float64 NumPy."""

import jax.numpy as jnp
import numpy as np

from jserve.pallas_kernels.ragged_paged_attention.batch import make_ragged_batch
from jserve.pallas_kernels.ragged_paged_attention.cases import Case
from jserve.pallas_kernels.ragged_paged_attention.dispatch import kv_pages_shape


class Problem:
    """One case with its memory: contexts in scattered pages, everything unused is NaN.

    Rows in `idle` have their tokens in the batch and own none of them.
    """

    def __init__(
        self,
        case: Case,
        seed: int = 0,
        kv_dtype: jnp.dtype = jnp.float32,
        idle: frozenset[int] = frozenset(),
        spare_pages: int = 5,
    ) -> None:
        self.case = case
        self.idle = idle
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
        num_pages = sum(counts) + spare_pages
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
            q_starts[r] = at
            here = slice(at, at + new)
            token_rows[here], live[here] = r, r not in self.idle
            if r not in self.idle:
                kv_lens[r], q_lens[r] = done + new, new
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
        """Float64 attention, row after row: [tokens, q_heads, head_dim]; idle rows', too."""
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

    def owned(self) -> np.ndarray:
        """Mask of the tokens that belong to a row that is not idle."""
        return np.repeat(
            [r not in self.idle for r in range(len(self.rows))], [new for _, new in self.rows]
        )

    def check_pages(self, pages: np.ndarray) -> None:
        """Every token's K and V stand where the table says; no other page but page 0 changed."""
        for r, kv in enumerate(self.kv):
            for p in range(0 if r in self.idle else kv.shape[1]):
                page = self.tables[r, p // self.case.page_size]
                stored = pages[page, :, :, p % self.case.page_size]
                np.testing.assert_array_equal(stored, kv[:, p])
        untouched = np.setdiff1d(np.arange(1, len(pages)), self.tables)
        assert np.isnan(pages[untouched]).all()
