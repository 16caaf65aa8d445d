"""Attention layers one after the other, each over pages of its own: caches as cold as in a step."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jserve.pallas_kernels.backend import Backend
from jserve.pallas_kernels.ragged_paged_attention.batch import RaggedBatch, make_ragged_batch
from jserve.pallas_kernels.ragged_paged_attention.dispatch import (
    kv_pages_shape,
    ragged_paged_attention,
)


@dataclass(frozen=True, slots=True)
class Heads:
    """The sizes of attention, and the sliding window of each layer."""

    q_heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    dtype: jnp.dtype  # of q, k and v
    kv_dtype: jnp.dtype  # of the pages
    windows: tuple[int, ...]


def median_ms(run: Callable[[], Any], turns: int) -> float:
    """Of some runs after one that compiles."""
    jax.block_until_ready(run())
    seconds: list[float] = []
    for _ in range(turns):
        started = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds)) * 1e3


def time_attention(
    heads: Heads, lengths: list[tuple[int, int]], backend: Backend, turns: int
) -> float:
    """Milliseconds of all layers, for rows of (tokens before, new tokens)."""
    batch, num_pages = _batch(lengths, heads.page_size)
    shape = kv_pages_shape(num_pages, heads.page_size, heads.kv_heads, heads.head_dim)
    fill = jax.jit(
        lambda key: jax.random.normal(key, shape, jnp.float32).astype(heads.kv_dtype),
    )
    pages = [fill(key) for key in jax.random.split(jax.random.key(0), len(heads.windows))]
    tokens = len(batch.write_pages)
    rng = np.random.default_rng(1)
    q, k, v = (
        jnp.asarray(rng.normal(size=(tokens, count, heads.head_dim)), heads.dtype)
        for count in (heads.q_heads, heads.kv_heads, heads.kv_heads)
    )
    q = q * heads.head_dim**-0.5
    prompts = any(new > 1 for _, new in lengths)

    def attend(q: jax.Array, pages: list[jax.Array]) -> tuple[jax.Array, list[jax.Array]]:
        done: list[jax.Array] = []
        for window, layer in zip(heads.windows, pages, strict=True):
            out, layer = ragged_paged_attention(
                q, k, v, layer, batch, window=window, prompts=prompts, backend=backend
            )
            q = (q + 1e-3 * out).astype(q.dtype)  # one layer after the other
            done.append(layer)
        return q, done

    step = jax.jit(attend, donate_argnums=1)

    def run() -> jax.Array:
        nonlocal pages
        out, pages = step(q, pages)
        return out

    return median_ms(run, turns)


def _batch(lengths: list[tuple[int, int]], page_size: int) -> tuple[RaggedBatch, int]:
    """The rows, decode rows first, their pages shuffled, and how many pages there are."""
    lengths = sorted(lengths, key=lambda length: length[1] > 1)
    totals = np.array([context + new for context, new in lengths])
    new = np.array([new for _, new in lengths])
    counts = -(-totals // page_size)
    pages = 1 + np.random.default_rng(0).permutation(counts.sum())
    width = -(-counts.max() // 128) * 128  # as wide as an engine's
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
