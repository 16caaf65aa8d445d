"""Counter-based randomness: Threefry keys of (seed, choice, position) and noise by token id."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int32, UInt32

from jserve.model.sampling.sharded_vocab import Axes, first_id

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA


def threefry2x32(
    key: tuple[UInt32[Array, "..."], UInt32[Array, "..."]],
    counter: tuple[UInt32[Array, "..."], UInt32[Array, "..."]],
) -> tuple[UInt32[Array, "..."], UInt32[Array, "..."]]:
    """Threefry-2x32 with 20 rounds (Salmon et al., SC 2011), elementwise with broadcasting.

    The same bits as JAX's generator. Unrolled here, so that XLA fuses it with what consumes the
    bits; JAX's CPU lowering is a loop over whole arrays and four times slower.
    """
    k0, k1 = key
    schedule = (k0, k1, k0 ^ k1 ^ jnp.uint32(_PARITY))
    x0, x1 = counter[0] + k0, counter[1] + k1
    for i in range(5):
        for rotation in _ROTATIONS[i % 2]:
            x0 = x0 + x1
            x1 = x0 ^ ((x1 << rotation) | (x1 >> (32 - rotation)))
        x0 = x0 + schedule[(i + 1) % 3]
        x1 = x1 + schedule[(i + 2) % 3] + jnp.uint32(i + 1)
    return x0, x1


def token_keys(
    seed: UInt32[Array, "rows 2"],
    choice: Int32[Array, " rows"],
    positions: Int32[Array, " rows"],
) -> UInt32[Array, "rows 2"]:
    """`fold_in(fold_in(key(seed), choice), position)` of each row, as raw key words.

    Args:
      seed: the high and low word of a 64-bit seed.
      choice: `Request.choice`.
      positions: absolute position of the token to be chosen.
    """
    key = (seed[:, 0], seed[:, 1])
    for data in (choice, positions):
        word = data.astype(jnp.uint32)
        key = threefry2x32(key, (jnp.zeros_like(word), word))
    return jnp.stack(key, axis=-1)


def gumbel(keys: UInt32[Array, "rows 2"], ids: UInt32[Array, "rows n"]) -> Float32[Array, "rows n"]:
    """Standard Gumbel noise of token `ids[r, c]` under key `keys[r]`; finite.

    The noise of a token depends on its id alone, so a few candidates and the whole vocabulary
    see the same values: 64 random bits per id, equal to `jax.random.bits(key, (vocab,), uint64)`.
    48 of them make the uniform, which is finest near zero, where the winners are: with the usual
    23, tokens of probability below 1e-7 would never be drawn, however many they are.
    """
    high, low = threefry2x32((keys[:, :1], keys[:, 1:]), (jnp.zeros_like(ids), ids))
    coarse = (high >> 8).astype(jnp.int32).astype(jnp.float32) * 2.0**-24
    rest = ((high & 0xFF) << 16) | (low >> 16)  # the next 24 of the 64 bits
    fine = (rest.astype(jnp.int32).astype(jnp.float32) + 0.5) * 2.0**-48
    uniform = jnp.minimum(coarse + fine, 1.0 - 2.0**-24)  # in (0, 1)
    return -jnp.log(-jnp.log1p(-uniform))


def vocab_gumbel(
    keys: UInt32[Array, "rows 2"], vocab: int, axes: Axes = ()
) -> Float32[Array, "rows {vocab}"]:
    """`gumbel` of every id below `vocab`, or of this device's share of `vocab` ids."""
    ids = lax.broadcasted_iota(jnp.uint32, (keys.shape[0], vocab), 1)
    if axes:
        ids = ids + first_id(vocab, axes).astype(jnp.uint32)
    return gumbel(keys, ids)
