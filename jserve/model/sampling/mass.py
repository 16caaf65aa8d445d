"""Probability mass as integers: sums that have no rounding, so no order and no shape.

A weight exp((logit - max) / temperature) becomes two int32 digits of 30 and 13 bits, scaled by a
power of two so that the whole row fits. Sums of digits are exact: the same for 128 candidates,
the whole vocabulary, any batch and any split of the vocabulary over devices.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jserve.model.sampling.sharded_vocab import Axes, sums

MAX_VOCAB = 1 << 18  # what the digits leave room for
_LOW_BITS = 13
_COARSE_BITS = 12
_TOTAL_BITS = 30


class Mass(NamedTuple):
    """Digits of weights, or of sums of them, in units of 2**-shift of the largest weight."""

    high: jax.Array  # int32
    low: jax.Array  # int32; below 2**13 for one weight, not carried over in sums

    def units(self) -> jax.Array:
        """The value rounded down to whole units: int32, at most 2**30."""
        return self.high + (self.low >> _LOW_BITS)


def scaled(x: jax.Array, largest: jax.Array, temperature: jax.Array) -> jax.Array:
    """(x - largest) / temperature: 0 for the best token, -inf for masked ones, never NaN.

    Its exponential is a token's weight, in [0, 1].

    Args:
      x: float32 [rows, n] logits, -inf where masked.
      largest: float32 [rows, 1], the row's largest logit.
      temperature: float32 [rows, 1], positive.
    """
    return jnp.where(
        x == -jnp.inf, -jnp.inf, jnp.where(x == largest, 0.0, (x - largest) / temperature)
    )


def shift_from_weights(weight: jax.Array, axes: Axes = ()) -> jax.Array:
    """The shift at which the weights of a row [rows, n] sum to at most 2**30 units: int32 [rows].

    Weights that do not belong to the row's set must be zero.
    """
    coarse = jnp.ceil(weight * 2.0**_COARSE_BITS).astype(jnp.int32)
    (bound,) = sums(coarse, axes=axes)
    bits = 32 - lax.clz(bound)
    return (_TOTAL_BITS + _COARSE_BITS) - bits


def digits(weight: jax.Array, shift: jax.Array) -> Mass:
    """The digits of each weight [rows, n] at the row's shift [rows]."""
    # 2.0**shift, exactly: the exponent bits of a float32.
    scale = lax.bitcast_convert_type((shift + 127) << 23, jnp.float32)
    units = weight * scale[:, None]
    high = units.astype(jnp.int32)
    low = ((units - high.astype(jnp.float32)) * 2.0**_LOW_BITS).astype(jnp.int32)
    return Mass(high, low)


def total(mass: Mass, where: jax.Array, axes: Axes = ()) -> Mass:
    """The sum over each row of `mass` [rows, n] of the entries `where`: [rows]."""
    return Mass(*sums(*(jnp.where(where, digit, 0) for digit in mass), axes=axes))


def log(sums: Mass, shift: jax.Array) -> jax.Array:
    """The natural logarithm of totals [rows], relative to the largest weight: float32 [rows]."""
    units = sums.units().astype(jnp.float32)
    scale = lax.bitcast_convert_type((127 - shift) << 23, jnp.float32)
    return jnp.log(units * scale)
