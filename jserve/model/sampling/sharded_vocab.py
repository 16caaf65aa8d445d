"""Reductions over rows of the vocabulary, whole or split over the devices of a mesh.

Inside a `shard_map` every device holds an equal share of the vocabulary, in the order of the
devices on `axes`. Arrays as wide as a share stay where they are; devices exchange the few values
that a row has of a kind (best tokens, sums), so all devices get the results of whole rows.
"""

import jax
import jax.numpy as jnp
from jax import lax

_BLOCK_BITS = 6
_BLOCK = 1 << _BLOCK_BITS  # tokens; measured best on CPU for vocabularies of 49k and 128k

Axes = tuple[str, ...]  # mesh axes that rows are split over; empty: rows are whole


def take_along_rows(x: jax.Array, at: jax.Array) -> jax.Array:
    """`x[r, at[r, j]]` for x [rows, n, …] and indices [rows, k], which are in bounds."""
    rows = jnp.arange(x.shape[0], dtype=jnp.int32)[:, None]
    return x.at[rows, at].get(mode="promise_in_bounds", wrap_negative_indices=False)


def width(x: jax.Array, axes: Axes) -> int:
    """Entries of a whole row of which `x` [rows, n] may be a share."""
    return x.shape[1] * lax.axis_size(axes) if axes else x.shape[1]


def first_id(n: int, axes: Axes) -> jax.Array:
    """The token id that this device's share of `n` begins with: int32 scalar."""
    return lax.axis_index(axes) * n


def token_ids(x: jax.Array, axes: Axes) -> jax.Array:
    """The token id of each entry of `x` [rows, n]: int32 [rows, n]."""
    at = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return at + first_id(x.shape[1], axes) if axes else at


def local_index(ids: jax.Array, n: int, axes: Axes) -> jax.Array:
    """Where token ids lie in a share of `n`; `n`, where a scatter drops them, if in another."""
    if not axes:
        return ids
    at = ids - first_id(n, axes)
    return jnp.where((at >= 0) & (at < n), at, n)


def take_tokens(x: jax.Array, ids: jax.Array, axes: Axes) -> jax.Array:
    """The logit of token `ids[r]` in each row of `x` [rows, n]: [rows, 1]."""
    if not axes:
        return take_along_rows(x, ids[:, None])
    at = local_index(ids, x.shape[1], axes)[:, None]
    rows = jnp.arange(x.shape[0], dtype=jnp.int32)[:, None]
    found = x.at[rows, at].get(mode="fill", fill_value=-jnp.inf, wrap_negative_indices=False)
    return lax.pmax(found, axes)


def largest(x: jax.Array, axes: Axes) -> jax.Array:
    """The largest entry of each row of `x` [rows, n]: [rows, 1]."""
    found = jnp.max(x, axis=-1, keepdims=True)
    return lax.pmax(found, axes) if axes else found


def sums(*xs: jax.Array, axes: Axes = ()) -> tuple[jax.Array, ...]:
    """The sum of each row of int32 arrays [rows, n], in one pass: int32 [rows] each."""
    # One reduction of several operands: XLA's CPU backend vectorizes it over the row. A plain
    # sum it rewrites into a tree of windows, five times slower; so a lone operand gets company,
    # and the barrier keeps that from being seen through.
    operands = (xs[0], xs[0] + 1) if len(xs) == 1 else xs
    found = lax.optimization_barrier(_add_up(operands))[: len(xs)]
    if not axes:
        return found
    return tuple(lax.psum(jnp.stack(found), axes))  # in one exchange


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


def argmax(x: jax.Array, axes: Axes = ()) -> jax.Array:
    """Lowest id of the largest value of each row of `x` [rows, n]: int32 [rows]."""
    best = _argmax(x)
    if not axes:
        return best
    values = take_along_rows(x, best[:, None])[:, 0]
    both = jnp.stack((lax.bitcast_convert_type(values, jnp.int32), best))
    both = lax.all_gather(both, axes)  # [devices, 2, rows]
    # Equal values lie on devices in the order of their ids, so the first device has the lowest.
    device = jnp.argmax(lax.bitcast_convert_type(both[:, 0], jnp.float32), axis=0)
    device = device.astype(jnp.int32)
    return device * x.shape[1] + take_along_rows(both[:, 1].T, device[:, None])[:, 0]


def _argmax(x: jax.Array) -> jax.Array:
    """By blocks, because XLA's CPU argmax does not vectorize: eight times faster at 49k."""
    rows, n = x.shape
    if n % _BLOCK or n == _BLOCK:
        return jnp.argmax(x, axis=-1).astype(jnp.int32)
    blocks = x.reshape(rows, n // _BLOCK, _BLOCK)
    block = jnp.argmax(jnp.max(blocks, axis=-1), axis=-1).astype(jnp.int32)
    best = take_along_rows(blocks, block[:, None])[:, 0]
    return block * _BLOCK + jnp.argmax(best, axis=-1).astype(jnp.int32)


def top_k(x: jax.Array, k: int, axes: Axes = ()) -> tuple[jax.Array, jax.Array]:
    """The `k` largest values of each row of `x` [rows, n], best first, ties by lower id.

    Returns:
      values [rows, k] and ids int32 [rows, k].
    """
    if not axes:
        return _blocked_top_k(x, k)
    rows, n = x.shape
    values, ids = _blocked_top_k(x, min(k, n))
    both = jnp.stack((lax.bitcast_convert_type(values, jnp.int32), ids + first_id(n, axes)))
    # The best of each device, in the order of the devices, so equal values in that of their ids.
    both = lax.all_gather(both, axes, axis=2)  # [2, rows, devices, min(k, n)]
    pool, ids = both.reshape(2, rows, -1)
    values, at = _top_k(lax.bitcast_convert_type(pool, jnp.float32), k)
    return values, take_along_rows(ids, at)


def _blocked_top_k(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """Exact. Only the k blocks with the largest maxima can hold the k best: the others are left."""
    rows, n = x.shape
    if n % _BLOCK or n // _BLOCK <= k:
        return _top_k(jnp.where(x == 0, 0.0, x), k)
    blocks = jnp.where(x == 0, 0.0, x).reshape(rows, n // _BLOCK, _BLOCK)  # -0 equals +0
    _, chosen = _top_k(jnp.max(blocks, axis=-1), k)
    chosen = jnp.sort(chosen, axis=-1)  # so that equal values stay in order of their index
    pool = take_along_rows(blocks, chosen).reshape(rows, k * _BLOCK)
    values, at = _top_k(pool, k)
    block = take_along_rows(chosen, at >> _BLOCK_BITS)
    return values, (block << _BLOCK_BITS) | (at & (_BLOCK - 1))


def _top_k(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    # XLA's CPU backend recognizes top_k as a sort whose only uses are two equal slices; the
    # barrier keeps the callers' own slices out of it. Unrecognized, it sorts everything. The
    # indices go first: a barrier on top_k's own tuple crashes XLA when it compiles for several
    # devices.
    values, ids = lax.top_k(x, k)
    ids, values = lax.optimization_barrier((ids, values))
    return values, ids
