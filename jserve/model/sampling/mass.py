"""Probability mass as integers: sums that have no rounding, so no order and no shape.

A weight exp((logit - max) / temperature) becomes two int32 digits of 30 and 13 bits, scaled by a
power of two so that the whole row fits. Sums of digits are exact: the same for 128 candidates,
the whole vocabulary, any batch and any split of the vocabulary over devices.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32

from jserve.model.sampling.sharded_vocab import Axes, sums

MAX_VOCAB = 1 << 18  # token ids that the digits have room for
_LOW_BITS = 13
_COARSE_BITS = 12
_TOTAL_BITS = 30


class Mass(NamedTuple):
    """Digits of weights, or of sums of them, in units of 2**-shift of the largest weight."""

    high: Int32[Array, " rows *n"]
    low: Int32[Array, " rows *n"]  # below 2**13 for one weight, not carried over in sums

    def units(self) -> Int32[Array, " rows *n"]:
        """The value rounded down to whole units, at most 2**30."""
        return self.high + (self.low >> _LOW_BITS)


def scaled(
    x: Float32[Array, "rows n"],
    largest: Float32[Array, "rows 1"],
    temperature: Float32[Array, "rows 1"],
) -> Float32[Array, "rows n"]:
    """(x - largest) / temperature: 0 for the best token, -inf for masked ones, never NaN.

    The exponential of the result is a token's weight, in [0, 1].

    Args:
      x: logits, -inf where masked.
      largest: the row's largest logit.
      temperature: positive.
    """
    return jnp.where(
        x == -jnp.inf, -jnp.inf, jnp.where(x == largest, 0.0, (x - largest) / temperature)
    )


def shift_from_weights(weight: Float32[Array, "rows n"], axes: Axes = ()) -> Int32[Array, " rows"]:
    """The shift at which the weights of a row sum to at most 2**30 units.

    Weights that do not belong to the row's set must be zero.
    """
    coarse = jnp.ceil(weight * 2.0**_COARSE_BITS).astype(jnp.int32)
    (bound,) = sums(coarse, axes=axes)
    bits = 32 - lax.clz(bound)
    return (_TOTAL_BITS + _COARSE_BITS) - bits


def digits(weight: Float32[Array, "rows n"], shift: Int32[Array, " rows"]) -> Mass:
    """The digits of each weight at the row's shift: [rows, n]."""
    # 2.0**shift, exactly: the exponent bits of a float32.
    scale = lax.bitcast_convert_type((shift + 127) << 23, jnp.float32)
    units = weight * scale[:, None]
    high = units.astype(jnp.int32)
    low = ((units - high.astype(jnp.float32)) * 2.0**_LOW_BITS).astype(jnp.int32)
    return Mass(high, low)


def total(mass: Mass, where: Bool[Array, "rows n"], axes: Axes = ()) -> Mass:
    """The sum over each row of `mass` [rows, n] of the entries `where`: [rows]."""
    return Mass(*sums(*(jnp.where(where, digit, 0) for digit in mass), axes=axes))


def log(sums: Mass, shift: Int32[Array, " rows"]) -> Float32[Array, " rows"]:
    """The natural logarithm of totals [rows], relative to the largest weight."""
    units = sums.units().astype(jnp.float32)
    scale = lax.bitcast_convert_type((127 - shift) << 23, jnp.float32)
    return jnp.log(units * scale)
