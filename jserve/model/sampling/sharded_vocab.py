"""Reductions over rows of the vocabulary, whole or split over the devices of a mesh.

Inside a `shard_map` every device holds an equal share of the vocabulary, in the order of the
devices on `axes`. Arrays as wide as a share stay where they are; devices exchange the few values
that a row has of a kind (best tokens, sums), so all devices get the results of whole rows.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32, Shaped

_BLOCK_BITS = 6
_BLOCK = 1 << _BLOCK_BITS  # tokens; measured best on CPU for vocabularies of 49k and 128k

Axes = tuple[str, ...]  # mesh axes that rows are split over; empty: rows are whole


def take_along_rows(
    x: Shaped[Array, " rows n *rest"], at: Int32[Array, "rows k"]
) -> Shaped[Array, " rows k *rest"]:
    """`x[r, at[r, j]]`; the indices are in bounds."""
    rows = jnp.arange(x.shape[0], dtype=jnp.int32)[:, None]
    return x.at[rows, at].get(mode="promise_in_bounds", wrap_negative_indices=False)


def width(x: Shaped[Array, "rows n"], axes: Axes) -> int:
    """Entries of a whole row, of which `x` may be a share."""
    return x.shape[1] * lax.axis_size(axes) if axes else x.shape[1]


def first_id(n: int, axes: Axes) -> Int32[Array, ""]:
    """The token id that this device's share of `n` ids begins with."""
    return lax.axis_index(axes) * n


def token_ids(x: Shaped[Array, "rows n"], axes: Axes) -> Int32[Array, "rows n"]:
    """The token id of each entry of `x`."""
    at = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return at + first_id(x.shape[1], axes) if axes else at


def local_index(ids: Int32[Array, "*shape"], n: int, axes: Axes) -> Int32[Array, "*shape"]:
    """Index of each id in this device's share of `n` ids, or `n` if another device owns it.

    A scatter drops the index `n`.
    """
    if not axes:
        return ids
    at = ids - first_id(n, axes)
    return jnp.where((at >= 0) & (at < n), at, n)


def take_tokens(
    x: Float32[Array, "rows n"], ids: Int32[Array, " rows"], axes: Axes
) -> Float32[Array, "rows 1"]:
    """The logit of token `ids[r]` in each row of `x`."""
    if not axes:
        return take_along_rows(x, ids[:, None])
    at = local_index(ids, x.shape[1], axes)[:, None]
    rows = jnp.arange(x.shape[0], dtype=jnp.int32)[:, None]
    found = x.at[rows, at].get(mode="fill", fill_value=-jnp.inf, wrap_negative_indices=False)
    return lax.pmax(found, axes)


def largest(x: Shaped[Array, "rows n"], axes: Axes) -> Shaped[Array, "rows 1"]:
    """The largest entry of each row of `x`."""
    found = jnp.max(x, axis=-1, keepdims=True)
    return lax.pmax(found, axes) if axes else found


def sums(*xs: Int32[Array, "rows n"], axes: Axes = ()) -> tuple[Int32[Array, " rows"], ...]:
    """The sum of each row of each array, in one pass."""
    # One reduction of several operands: XLA's CPU backend vectorizes it over the row. A plain
    # sum it rewrites into a tree of windows, five times slower; so a lone operand gets a second
    # one, and the barrier keeps XLA from removing it.
    operands = (xs[0], xs[0] + 1) if len(xs) == 1 else xs
    found = lax.optimization_barrier(_add_up(operands))[: len(xs)]
    if not axes:
        return found
    return tuple(lax.psum(jnp.stack(found), axes))  # in one exchange


def _add_up(
    operands: tuple[Int32[Array, " rows n *rest"], ...],
) -> tuple[Int32[Array, " rows *rest"], ...]:
    """Sums over axis 1, in one reduction."""

    def add(a: tuple[jax.Array, ...], b: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        return tuple(x + y for x, y in zip(a, b, strict=True))

    return tuple(lax.reduce(operands, tuple(jnp.int32(0) for _ in operands), add, (1,)))


def count(flags: Bool[Array, " rows"]) -> Int32[Array, ""]:
    """Number of true flags."""
    (number,) = sums(flags.astype(jnp.int32)[None])
    return number[0]


def sums_before(*xs: Int32[Array, "rows n"]) -> tuple[Int32[Array, "rows n"], ...]:
    """For each entry, the sum of the entries before it in its row; `n` is small."""
    n = xs[0].shape[1]
    earlier = jnp.tri(n, n, -1, dtype=bool).T[None]  # [1, from, to]
    return _add_up(tuple(jnp.where(earlier, x[:, :, None], 0) for x in xs))


def argmax(x: Float32[Array, "rows n"], axes: Axes = ()) -> Int32[Array, " rows"]:
    """Lowest id of the largest value of each row of `x`."""
    best = _argmax(x)
    if not axes:
        return best
    values = take_along_rows(x, best[:, None])[:, 0]
    both = jnp.stack((lax.bitcast_convert_type(values, jnp.int32), best))
    both = lax.all_gather(both, axes)  # [devices, 2, rows]
    # Devices hold ids in order, so the first device of equal values has the lowest id.
    device = jnp.argmax(lax.bitcast_convert_type(both[:, 0], jnp.float32), axis=0)
    device = device.astype(jnp.int32)
    return device * x.shape[1] + take_along_rows(both[:, 1].T, device[:, None])[:, 0]


def _argmax(x: Float32[Array, "rows n"]) -> Int32[Array, " rows"]:
    """The argmax by blocks: XLA's on CPU does not vectorize and is eight times slower at 49k."""
    rows, n = x.shape
    if n % _BLOCK or n == _BLOCK:
        return jnp.argmax(x, axis=-1).astype(jnp.int32)
    blocks = x.reshape(rows, n // _BLOCK, _BLOCK)
    block = jnp.argmax(jnp.max(blocks, axis=-1), axis=-1).astype(jnp.int32)
    best = take_along_rows(blocks, block[:, None])[:, 0]
    return block * _BLOCK + jnp.argmax(best, axis=-1).astype(jnp.int32)


def top_k(
    x: Float32[Array, "rows n"], k: int, axes: Axes = ()
) -> tuple[Float32[Array, "rows {k}"], Int32[Array, "rows {k}"]]:
    """The `k` largest values of each row of `x` and their ids, best first, ties by lower id."""
    if not axes:
        return _blocked_top_k(x, k)
    rows, n = x.shape
    values, ids = _blocked_top_k(x, min(k, n))
    both = jnp.stack((lax.bitcast_convert_type(values, jnp.int32), ids + first_id(n, axes)))
    # Devices come in the order of their ids, so equal values stay in the order of token ids.
    both = lax.all_gather(both, axes, axis=2)  # [2, rows, devices, min(k, n)]
    pool, ids = both.reshape(2, rows, -1)
    values, at = _top_k(lax.bitcast_convert_type(pool, jnp.float32), k)
    return values, take_along_rows(ids, at)


def _blocked_top_k(
    x: Float32[Array, "rows n"], k: int
) -> tuple[Float32[Array, "rows {k}"], Int32[Array, "rows {k}"]]:
    """The exact top k, read from the k blocks with the largest maxima: no other can hold one."""
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


def _top_k(
    x: Float32[Array, "rows n"], k: int
) -> tuple[Float32[Array, "rows {k}"], Int32[Array, "rows {k}"]]:
    # XLA's CPU backend recognizes top_k as a sort whose only uses are two equal slices; the
    # barrier keeps the callers' own slices out of it. Unrecognized, it sorts everything. The
    # indices go first: a barrier on top_k's own tuple crashes XLA when it compiles for several
    # devices.
    values, ids = lax.top_k(x, k)
    ids, values = lax.optimization_barrier((ids, values))
    return values, ids
