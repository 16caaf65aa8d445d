"""Attention layers one after the other, each over pages of its own: caches as cold as in a step."""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.kernels.libraries import AttentionLibrary, agree
from jserve.pallas_kernels.backend import Backend
from jserve.pallas_kernels.ragged_paged_attention.batch import RaggedBatch, make_ragged_batch
from jserve.pallas_kernels.ragged_paged_attention.dispatch import (
    kv_pages_shape,
    ragged_paged_attention,
)

Lengths = list[tuple[int, int]]  # tokens before and new tokens of each row


@dataclass(frozen=True, slots=True)
class Heads:
    """The sizes of attention, and the sliding window of each layer."""

    q_heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    dtype: jnp.dtype  # dtype of q, k and v
    kv_dtype: jnp.dtype  # dtype of the pages
    windows: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Turns:
    """Numbers of runs and turns of a measurement."""

    number: int  # turns; the median counts
    runs: int = 1  # runs of a turn, one after the other: only the first one's start is waited for

    def median_ms(self, run: Callable[[], Any]) -> float:
        """Milliseconds of one run, after one that compiles."""
        jax.block_until_ready(run())
        seconds: list[float] = []
        for _ in range(self.number):
            started = time.perf_counter()
            jax.block_until_ready([run() for _ in range(self.runs)])
            seconds.append(time.perf_counter() - started)
        return float(np.median(seconds)) * 1e3 / self.runs


def time_attention(heads: Heads, lengths: Lengths, backend: Backend, turns: Turns) -> float:
    """Milliseconds of all layers."""
    problem = _problem(heads, lengths)
    pages = [problem.fill(i) for i in range(len(heads.windows))]
    ours = functools.partial(
        ragged_paged_attention, prompts=any(new > 1 for _, new in lengths), backend=backend
    )

    def attend(q: jax.Array, pages: list[jax.Array]) -> tuple[jax.Array, list[jax.Array]]:
        done: list[jax.Array] = []
        for window, layer in zip(heads.windows, pages, strict=True):
            out, layer = ours(q, problem.k, problem.v, layer, problem.batch, window=window)
            q = _next(q, out)
            done.append(layer)
        return q, done

    step = jax.jit(attend, donate_argnums=1)

    def run() -> jax.Array:
        nonlocal pages
        out, pages = step(problem.q, pages)
        return out

    return turns.median_ms(run)


def time_library(
    heads: Heads, lengths: Lengths, backend: Backend, library: AttentionLibrary, turns: Turns
) -> float:
    """Milliseconds of all layers with someone else's kernel, over K and V that `backend` wrote.

    Raises ValueError where it does not find what `backend` does.
    """
    problem = _problem(heads, lengths)
    most = max(before + new for before, new in lengths)
    write = jax.jit(
        functools.partial(
            ragged_paged_attention,
            window=heads.windows[0],
            prompts=any(new > 1 for _, new in lengths),
            backend=backend,
        ),
        donate_argnums=3,
    )
    lay_out = jax.jit(lambda pages: library.lay_out(pages, problem.batch, most))
    layers: list[Any] = []
    for i in range(len(heads.windows)):
        out, pages = write(problem.q, problem.k, problem.v, problem.fill(i), problem.batch)
        layers.append(lay_out(pages))
        if i == 0 and not agree(library.attend(problem.q, layers[0], problem.batch), out):
            raise ValueError(f"{library.name} does not agree with {backend}")
        del pages

    def attend(q: jax.Array, layers: list[Any]) -> jax.Array:
        for layer in layers:
            q = _next(q, library.attend(q, layer, problem.batch))
        return q

    return turns.median_ms(functools.partial(jax.jit(attend), problem.q, layers))


def _next(q: jax.Array, out: jax.Array) -> jax.Array:
    """Makes the queries of the next layer, which so waits for this one."""
    return (q + 1e-3 * out).astype(q.dtype)


class _Problem(NamedTuple):
    q: jax.Array
    k: jax.Array
    v: jax.Array
    batch: RaggedBatch
    fill: Callable[[int], jax.Array]  # pages of a layer


def _problem(heads: Heads, lengths: Lengths) -> _Problem:
    batch, num_pages = _batch(lengths, heads.page_size)
    shape = kv_pages_shape(num_pages, heads.page_size, heads.kv_heads, heads.head_dim)
    fill = jax.jit(
        lambda seed: jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(
            heads.kv_dtype
        )
    )
    rng = np.random.default_rng(1)
    q, k, v = (
        jnp.asarray(rng.normal(size=(len(batch.write_pages), count, heads.head_dim)), heads.dtype)
        for count in (heads.q_heads, heads.kv_heads, heads.kv_heads)
    )
    return _Problem(q * heads.head_dim**-0.5, k, v, batch, fill)


def _batch(lengths: Lengths, page_size: int) -> tuple[RaggedBatch, int]:
    """The rows, decode rows first, their pages shuffled, and how many pages there are."""
    lengths = sorted(lengths, key=lambda length: length[1] > 1)
    totals = np.array([context + new for context, new in lengths])
    new = np.array([new for _, new in lengths])
    counts = -(-totals // page_size)
    pages = 1 + np.random.default_rng(0).permutation(counts.sum())
    width = -(-counts.max() // 128) * 128  # the width of an engine's table
    table = np.zeros((len(lengths), width), np.int32)
    table[np.arange(width) < counts[:, None]] = pages
    starts = np.cumsum(new) - new
    rows = np.repeat(np.arange(len(lengths)), new)
    positions = np.arange(new.sum()) - starts[rows] + (totals - new)[rows]
    batch = make_ragged_batch(
        jnp.asarray(table, jnp.int32),
        jnp.asarray(totals, jnp.int32),
        jnp.asarray(starts, jnp.int32),
        jnp.asarray(new, jnp.int32),
        jnp.int32(np.count_nonzero(new == 1)),
        jnp.int32(len(lengths)),
        jnp.asarray(rows, jnp.int32),
        jnp.asarray(positions, jnp.int32),
        jnp.ones(len(rows), bool),
        page_size=page_size,
    )
    return batch, int(counts.sum())
