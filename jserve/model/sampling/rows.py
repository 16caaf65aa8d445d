"""Row-wise building blocks: tiles of the rows that need a path, blocked argmax and top-k."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax

_BLOCK_BITS = 6
_BLOCK = 1 << _BLOCK_BITS  # tokens; measured best on CPU for vocabularies of 49k and 128k

Carry = TypeVar("Carry")


def for_each_tile(
    needed: jax.Array, tile: int, body: Callable[[jax.Array, Carry], Carry], carry: Carry
) -> Carry:
    """Runs `body(rows, carry)` over the rows where `needed`, `tile` of them at a time.

    The cost follows the number of such rows; with none, nothing runs. `rows` is int32 [tile];
    surplus entries are `len(needed)`: gather them clipped, scatter them dropped.
    """
    num_rows = needed.shape[0]
    max_tiles = -(-num_rows // tile)
    if max_tiles == 1:
        # Not a loop: XLA would hoist the body, which no longer depends on the iteration.
        rows = jnp.arange(tile, dtype=jnp.int32)
        needed = jnp.pad(needed, (0, tile - num_rows))
        rows = jnp.where(needed, rows, num_rows)
        return lax.cond(count(needed) > 0, lambda c: body(rows, c), lambda c: c, carry)
    # The needed rows in order, then padding.
    order = jnp.sort(jnp.where(needed, jnp.arange(num_rows, dtype=jnp.int32), num_rows))
    order = jnp.pad(order, (0, max_tiles * tile - num_rows), constant_values=num_rows)
    num_tiles = lax.div(count(needed) + (tile - 1), tile)

    def step(i: jax.Array, carry: Carry) -> Carry:
        return body(lax.dynamic_slice(order, (i * tile,), (tile,)), carry)

    return lax.fori_loop(0, num_tiles, step, carry)


def take(x: jax.Array, rows: jax.Array) -> jax.Array:
    """`x[rows]` with surplus rows clipped."""
    return x.at[rows].get(mode="clip", wrap_negative_indices=False)


def put(x: jax.Array, rows: jax.Array, values: jax.Array) -> jax.Array:
    """`x` with `values` at `rows`, surplus rows dropped."""
    return x.at[rows].set(values, mode="drop", wrap_negative_indices=False)


def pick(x: jax.Array, at: jax.Array) -> jax.Array:
    """`x[r, at[r, j]]` for x [rows, n, …] and indices [rows, k], which are in bounds."""
    rows = jnp.arange(x.shape[0], dtype=jnp.int32)[:, None]
    return x.at[rows, at].get(mode="promise_in_bounds", wrap_negative_indices=False)


def sums(*xs: jax.Array) -> tuple[jax.Array, ...]:
    """The sum of each row of int32 arrays [rows, n], in one pass: int32 [rows] each."""
    # One reduction of several operands: XLA's CPU backend vectorizes it over the row. A plain
    # sum it rewrites into a tree of windows, five times slower; so a lone operand gets company,
    # and the barrier keeps that from being seen through.
    operands = (xs[0], xs[0] + 1) if len(xs) == 1 else xs
    return lax.optimization_barrier(_add_up(operands))[: len(xs)]


def _add_up(operands: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Sums over axis 1, in one reduction."""

    def add(a: tuple[jax.Array, ...], b: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return tuple(x + y for x, y in zip(a, b, strict=True))

    return tuple(lax.reduce(operands, tuple(jnp.int32(0) for _ in operands), add, (1,)))


def count(flags: jax.Array) -> jax.Array:
    """How many of bool [rows] are true: int32 scalar."""
    (number,) = sums(flags.astype(jnp.int32)[None])
    return number[0]


def sums_before(*xs: jax.Array) -> tuple[jax.Array, ...]:
    """For each entry of int32 arrays [rows, n], n small, the sum of those before it in the row."""
    n = xs[0].shape[1]
    earlier = jnp.tri(n, n, -1, dtype=bool).T[None]  # [1, from, to]
    return _add_up(tuple(jnp.where(earlier, x[:, :, None], 0) for x in xs))


def argmax(x: jax.Array) -> jax.Array:
    """Lowest index of the largest value of each row of `x` [rows, n]: int32 [rows].

    By blocks, because XLA's CPU argmax does not vectorize: eight times faster at 49k.
    """
    rows, n = x.shape
    if n % _BLOCK or n == _BLOCK:
        return jnp.argmax(x, axis=-1).astype(jnp.int32)
    blocks = x.reshape(rows, n // _BLOCK, _BLOCK)
    block = jnp.argmax(jnp.max(blocks, axis=-1), axis=-1).astype(jnp.int32)
    best = pick(blocks, block[:, None])[:, 0]
    return block * _BLOCK + jnp.argmax(best, axis=-1).astype(jnp.int32)


def top_k(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """The `k` largest values of each row of `x` [rows, n], best first, ties by lower index.

    Exact. Only the k blocks with the largest maxima can hold them, so the selection runs over
    those. A vocabulary split over devices does the same with its shards as blocks.

    Returns:
      values [rows, k] and indices int32 [rows, k].
    """
    rows, n = x.shape
    if n % _BLOCK or n // _BLOCK <= k:
        return _top_k(jnp.where(x == 0, 0.0, x), k)
    blocks = jnp.where(x == 0, 0.0, x).reshape(rows, n // _BLOCK, _BLOCK)  # -0 equals +0
    _, chosen = _top_k(jnp.max(blocks, axis=-1), k)
    chosen = jnp.sort(chosen, axis=-1)  # so that equal values stay in order of their index
    pool = pick(blocks, chosen).reshape(rows, k * _BLOCK)
    values, at = _top_k(pool, k)
    block = pick(chosen, at >> _BLOCK_BITS)
    return values, (block << _BLOCK_BITS) | (at & (_BLOCK - 1))


def _top_k(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    # XLA's CPU backend recognizes top_k as a sort whose only uses are two equal slices; the
    # barrier keeps the callers' own slices out of it. Unrecognized, it sorts everything. The
    # indices go first: a barrier on top_k's own tuple crashes XLA when it compiles for several
    # devices.
    values, ids = lax.top_k(x, k)
    ids, values = lax.optimization_barrier((ids, values))
    return values, ids
