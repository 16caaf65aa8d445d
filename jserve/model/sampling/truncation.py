"""Which tokens of a row may be drawn: min_p, top_k and top_p, exactly and without a sort.

Tokens are ordered by logit, best first, equal logits by lower id. Every rule keeps a prefix:

- min_p keeps tokens whose weight is at least min_p times the best one's.
- top_k keeps the k best and every token equal to the k-th, as vLLM does.
- top_p keeps a token if the mass before it, among what the first two rules left, is below
  top_p of theirs. The first is always kept. Among equal tokens at the border the lower ids stay
  (vLLM: whatever its sort yields).

`from_candidates` decides a row from its best few tokens, if they suffice. `from_vocab` decides
any row by bisection over the bit patterns of its logits. Both take the same decisions.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jserve.model.sampling import mass as masses
from jserve.model.sampling.mass import Mass
from jserve.model.sampling.sharded_vocab import (
    Axes,
    largest,
    sums,
    sums_before,
    take_along_rows,
    token_ids,
    width,
)


class Truncation(NamedTuple):
    """The parameters of each row, normalized; all [rows]."""

    temperature: jax.Array  # float32, positive
    top_k: jax.Array  # int32, 1 … vocab; vocab keeps all
    top_p: jax.Array  # float32; 1 or more keeps all
    min_p: jax.Array  # float32; 0 keeps all

    def truncates(self, vocab: int) -> jax.Array:
        """Whether any rule can drop a token: bool [rows]."""
        return (self.top_k < vocab) | (self.top_p < 1.0) | (self.min_p > 0.0)


class Total(NamedTuple):
    """The mass of a row's set before top_p; both int32 [rows]."""

    shift: jax.Array
    units: jax.Array


def total_from_weights(weight: jax.Array, axes: Axes = ()) -> Total:
    """The total of weights [rows, n] that are zero outside of the set."""
    shift = masses.shift_from_weights(weight, axes)
    sums = masses.total(masses.digits(weight, shift), weight > 0, axes)
    return Total(shift, sums.units())


def vocab_total(x: jax.Array, params: Truncation, axes: Axes = ()) -> Total:
    """The total of the tokens that min_p leaves of whole rows, `x` [rows, vocab] or a share."""
    weight = jnp.exp(masses.scaled(x, largest(x, axes), params.temperature[:, None]))
    return total_from_weights(jnp.where(weight >= params.min_p[:, None], weight, 0.0), axes)


def _target(params: Truncation, units: jax.Array) -> jax.Array:
    """The mass before a token, in units, from which on top_p drops it: int32 [rows]."""
    wanted = jnp.ceil(params.top_p * units.astype(jnp.float32)).astype(jnp.int32)
    return jnp.where(params.top_p < 1.0, jnp.maximum(wanted, 1), jnp.int32(2**31 - 1))


class Candidates(NamedTuple):
    """The best tokens of each row in order, with what top_k and min_p leave of them."""

    scaled: jax.Array  # float32 [rows, k], (logit - max) / temperature
    weight: jax.Array  # float32 [rows, k]; zero for tokens that top_k or min_p drop
    kept: jax.Array  # bool [rows, k]; what min_p and top_k leave
    closed: jax.Array  # bool [rows]: no token outside passes top_k and min_p


def candidates(values: jax.Array, params: Truncation, vocab: int) -> Candidates:
    """Applies min_p and top_k to the best tokens of each row: `values` [rows, k], best first."""
    rows, k = values.shape
    scaled = masses.scaled(values, values[:, :1], params.temperature[:, None])
    weight = jnp.exp(scaled)
    at = jnp.clip(params.top_k - 1, 0, k - 1)
    kth = take_along_rows(values, at[:, None])
    kept = (weight >= params.min_p[:, None]) & (values > -jnp.inf)
    kept &= (values >= kth) | (params.top_k > k)[:, None]
    closed = ~kept[:, -1] if k < vocab else jnp.ones((rows,), bool)
    return Candidates(scaled, jnp.where(kept, weight, 0.0), kept, closed)


def from_candidates(
    best: Candidates, params: Truncation, total: Total
) -> tuple[jax.Array, jax.Array]:
    """Which candidates may be drawn, and whether they are all that may.

    Args:
      best: the best tokens of each row.
      params: the row's parameters.
      total: of the row's whole set. Where it is unknown (units 0) and the row is not closed,
        the row is undecided.

    Returns:
      keep: bool [rows, k].
      decided: bool [rows].
    """
    digits = masses.digits(best.weight, total.shift)
    before = Mass(*sums_before(*digits)).units()
    keep = best.kept & (before < _target(params, total.units)[:, None])
    cut = (params.top_p < 1.0) & (total.units > 0) & ~keep[:, -1]
    return keep, best.closed | cut


def _ordered(x: jax.Array) -> jax.Array:
    """int32 keys in the order of the float32 values; -0 equals +0."""
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.int32)
    return bits ^ ((bits >> 31) & jnp.int32(0x7FFFFFFF))


def _bisect(low: jax.Array, high: jax.Array, holds: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The smallest integer in (low, high] for which the monotone `holds` is true: int32 [rows].

    `holds(high)` is taken for granted. Rows with low + 1 == high are done from the start; where
    all are, nothing runs.
    """

    def open_rows(bounds: tuple[jax.Array, jax.Array]) -> jax.Array:
        return jnp.any(bounds[0] + 1 < bounds[1])

    def halve(bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # the mean, rounded down, without overflow
        yes = holds(middle)
        undone = low + 1 < high
        return jnp.where(undone & ~yes, middle, low), jnp.where(undone & yes, middle, high)

    return lax.while_loop(open_rows, halve, (low, high))[1]


def from_vocab(x: jax.Array, params: Truncation, axes: Axes = ()) -> tuple[jax.Array, jax.Array]:
    """Which tokens of whole rows may be drawn.

    Args:
      x: float32 [rows, vocab] processed logits, -inf where masked; or this device's share of
        the vocabulary, like both results.
      params: the row's parameters.
      axes: see `sharded_vocab`.

    Returns:
      keep: bool [rows, vocab].
      scaled: float32 [rows, vocab], (x - max) / temperature.
    """
    vocab = width(x, axes)
    best = largest(x, axes)
    scaled = masses.scaled(x, best, params.temperature[:, None])
    key = _ordered(x)
    top = _ordered(best[:, 0])
    bottom = jnp.minimum(_ordered(jnp.float32(-jnp.inf)), top - 1)  # masked tokens stay out

    def fewer_above(threshold: jax.Array) -> jax.Array:
        (above,) = sums((key > threshold[:, None]).astype(jnp.int32), axes=axes)
        return above < params.top_k

    wants_k = params.top_k < vocab
    kth = _bisect(jnp.where(wants_k, bottom, top - 1), top, fewer_above)
    kth = jnp.where(wants_k, kth, bottom + 1)
    weight = jnp.exp(scaled)
    kept = (key >= kth[:, None]) & (weight >= params.min_p[:, None]) & (x > -jnp.inf)
    keep = lax.cond(
        jnp.any(params.top_p < 1.0),
        lambda: _top_p(key, weight, kept, top, bottom, params, axes),
        lambda: kept,
    )
    return keep, scaled


def _top_p(
    key: jax.Array,
    weight: jax.Array,
    kept: jax.Array,
    top: jax.Array,
    bottom: jax.Array,
    params: Truncation,
    axes: Axes,
) -> jax.Array:
    """The part of `kept` [rows, vocab] that top_p leaves; all of it where top_p is 1."""
    vocab = width(key, axes)
    weight = jnp.where(kept, weight, 0.0)
    total = total_from_weights(weight, axes)
    digits = masses.digits(weight, total.shift)
    target = _target(params, total.units)
    wants_p = params.top_p < 1.0

    def less_above(threshold: jax.Array) -> jax.Array:
        return masses.total(digits, key > threshold[:, None], axes).units() < target

    border = _bisect(jnp.where(wants_p, bottom, top - 1), top, less_above)
    above = masses.total(digits, key > border[:, None], axes)
    tied = kept & (key == border[:, None])
    (ties,) = sums(tied.astype(jnp.int32), axes=axes)
    each = Mass(*(largest(jnp.where(tied, d, 0), axes)[:, 0] for d in digits))

    def ends_before(n: jax.Array) -> jax.Array:
        return Mass(above.high + n * each.high, above.low + n * each.low).units() >= target

    # Of the equal tokens at the border the first `num_tied` stay: find the id where they end.
    zero = jnp.zeros_like(ties)
    num_tied = _bisect(zero, jnp.maximum(ties, 1), ends_before)
    ids = token_ids(key, axes)

    def holds_them(end: jax.Array) -> jax.Array:
        (tied_before,) = sums((tied & (ids < end[:, None])).astype(jnp.int32), axes=axes)
        return tied_before >= num_tied

    cuts = wants_p & (num_tied < ties)
    end = _bisect(jnp.where(cuts, zero, vocab - 1), jnp.full_like(ties, vocab), holds_them)
    left = kept & ((key > border[:, None]) | (tied & (ids < end[:, None])))
    return jnp.where(wants_p[:, None], left, kept)
