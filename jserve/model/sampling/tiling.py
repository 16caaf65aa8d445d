"""Tiles of rows: work runs for the rows that need it, at a cost that follows their number."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int32, Shaped

from jserve.model.sampling.sharded_vocab import count

Carry = TypeVar("Carry")


def for_each_tile(
    needed: Bool[Array, " rows"], tile: int, body: Callable[[jax.Array, Carry], Carry], carry: Carry
) -> Carry:
    """Runs `body(rows, carry)` over the rows where `needed`, `tile` of them at a time.

    The cost follows the number of such rows; with none, nothing runs. `rows` is int32 [tile];
    surplus entries are `len(needed)`: gather them clipped, scatter them dropped.
    """
    num_rows = needed.shape[0]
    max_tiles = -(-num_rows // tile)
    if max_tiles == 1:
        # A loop would not do: its body no longer depends on the iteration, so XLA would hoist it.
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


def gather_rows(
    x: Shaped[Array, " all *rest"], rows: Int32[Array, " tile"]
) -> Shaped[Array, " tile *rest"]:
    """`x[rows]`, with surplus rows clipped."""
    return x.at[rows].get(mode="clip", wrap_negative_indices=False)


def scatter_rows(
    x: Shaped[Array, " all *rest"],
    rows: Int32[Array, " tile"],
    values: Shaped[Array, " tile *rest"],
) -> Shaped[Array, " all *rest"]:
    """`x` with `values` at `rows`, surplus rows dropped."""
    return x.at[rows].set(values, mode="drop", wrap_negative_indices=False)
