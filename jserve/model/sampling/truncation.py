"""Truncation of a row to the tokens that may be drawn: min_p, top_k, top_p, without a sort.

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
from jaxtyping import Array, Bool, Float32, Int32

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
    """The parameters of each row, normalized."""

    temperature: Float32[Array, " rows"]  # positive
    top_k: Int32[Array, " rows"]  # 1 … vocab; vocab keeps all
    top_p: Float32[Array, " rows"]  # 1 or more keeps all
    min_p: Float32[Array, " rows"]  # 0 keeps all

    def truncates(self, vocab: int) -> Bool[Array, " rows"]:
        """Whether any rule can drop a token of the row."""
        return (self.top_k < vocab) | (self.top_p < 1.0) | (self.min_p > 0.0)


class Total(NamedTuple):
    """The mass of a row's set before top_p."""

    shift: Int32[Array, " rows"]
    units: Int32[Array, " rows"]


def total_from_weights(weight: Float32[Array, "rows n"], axes: Axes = ()) -> Total:
    """The total of weights that are zero outside of the set."""
    shift = masses.shift_from_weights(weight, axes)
    sums = masses.total(masses.digits(weight, shift), weight > 0, axes)
    return Total(shift, sums.units())


def vocab_total(x: Float32[Array, "rows vocab"], params: Truncation, axes: Axes = ()) -> Total:
    """The total of the tokens that min_p leaves of whole rows; `x` may be a device's share."""
    weight = jnp.exp(masses.scaled(x, largest(x, axes), params.temperature[:, None]))
    return total_from_weights(jnp.where(weight >= params.min_p[:, None], weight, 0.0), axes)


def _target(params: Truncation, units: Int32[Array, " rows"]) -> Int32[Array, " rows"]:
    """The mass before a token, in units, at and above which top_p drops the token."""
    wanted = jnp.ceil(params.top_p * units.astype(jnp.float32)).astype(jnp.int32)
    return jnp.where(params.top_p < 1.0, jnp.maximum(wanted, 1), jnp.int32(2**31 - 1))


class Candidates(NamedTuple):
    """The best tokens of each row in order, after top_k and min_p."""

    scaled: Float32[Array, "rows k"]  # (logit - max) / temperature
    weight: Float32[Array, "rows k"]  # zero for tokens that top_k or min_p drop
    kept: Bool[Array, "rows k"]  # min_p and top_k leave the token
    closed: Bool[Array, " rows"]  # no token outside passes top_k and min_p


def candidates(values: Float32[Array, "rows k"], params: Truncation, vocab: int) -> Candidates:
    """Applies min_p and top_k to the logits of the best tokens of each row, best first."""
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
) -> tuple[Bool[Array, "rows k"], Bool[Array, " rows"]]:
    """Tells which candidates may be drawn, and in which rows no other token may.

    Args:
      best: the best tokens of each row.
      params: the row's parameters.
      total: of the row's whole set. Where it is unknown (units 0) and the row is not closed,
        the row is undecided.
    """
    digits = masses.digits(best.weight, total.shift)
    before = Mass(*sums_before(*digits)).units()
    keep = best.kept & (before < _target(params, total.units)[:, None])
    cut = (params.top_p < 1.0) & (total.units > 0) & ~keep[:, -1]
    return keep, best.closed | cut


def _ordered(x: Float32[Array, "*shape"]) -> Int32[Array, "*shape"]:
    """Keys in the order of the values; -0 equals +0."""
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.int32)
    return bits ^ ((bits >> 31) & jnp.int32(0x7FFFFFFF))


def _bisect(
    low: Int32[Array, " rows"],
    high: Int32[Array, " rows"],
    holds: Callable[[jax.Array], jax.Array],
) -> Int32[Array, " rows"]:
    """The smallest integer in (low, high] for which the monotone `holds` is true.

    `holds(high)` is taken for granted. Rows with low + 1 == high are done from the start; if all
    are, nothing runs.
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


def from_vocab(
    x: Float32[Array, "rows vocab"], params: Truncation, axes: Axes = ()
) -> tuple[Bool[Array, "rows vocab"], Float32[Array, "rows vocab"]]:
    """Tells which tokens of whole rows may be drawn, and scales all: (x - max) / temperature.

    Args:
      x: processed logits, -inf where masked; or this device's share of the vocabulary, like
        both results.
      params: the row's parameters.
      axes: see `sharded_vocab`.
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
    key: Int32[Array, "rows vocab"],
    weight: Float32[Array, "rows vocab"],
    kept: Bool[Array, "rows vocab"],
    top: Int32[Array, " rows"],
    bottom: Int32[Array, " rows"],
    params: Truncation,
    axes: Axes,
) -> Bool[Array, "rows vocab"]:
    """The part of `kept` that top_p leaves; all of it where top_p is 1."""
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

    # The first `num_tied` of the equal tokens at the border stay: find the id where they end.
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
