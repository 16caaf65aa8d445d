"""What a rotation means, in plain jnp; XLA fuses it well enough anywhere but on CPU."""

import jax
import jax.numpy as jnp


def rotary(
    q: jax.Array,
    k: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    *,
    q_scale: float,
    num_tokens: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """See `dispatch`."""
    del num_tokens
    turned_q = _turn(q.astype(jnp.float32), cos, sin) * q_scale
    return turned_q.astype(q.dtype), _turn(k.astype(jnp.float32), cos, sin).astype(k.dtype)


def _turn(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    cos, sin = cos[:, None, :], sin[:, None, :]
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)
