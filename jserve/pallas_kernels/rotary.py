"""Rotary embedding of queries and keys."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Int

from jserve.pallas_kernels.backend import Backend, implementations
from jserve.pallas_kernels.native import calls

_Products = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def rotary(
    q: Float[jax.Array, "tokens q_heads head_dim"],
    k: Float[jax.Array, "tokens kv_heads head_dim"],
    cos: Float[jax.Array, "tokens half_dim"],
    sin: Float[jax.Array, "tokens half_dim"],
    *,
    q_scale: float,
    num_tokens: Int[jax.Array, ""] | None = None,
    backend: Backend,
) -> tuple[
    Float[jax.Array, "tokens q_heads head_dim"], Float[jax.Array, "tokens kv_heads head_dim"]
]:
    """Rotates every head by its token's angles, in float32, and scales the queries.

    Dimension i rotates with i + head_dim / 2 (RoFormer, Su et al., 2021, in Hugging Face's order).
    With `num_tokens` only the first `num_tokens` tokens mean something: a backend may skip the
    others.
    """
    tokens, _, head_dim = q.shape
    angles = (tokens, head_dim // 2)
    if head_dim % 2 or k.shape[::2] != q.shape[::2] or cos.shape != angles or sin.shape != angles:
        raise ValueError(
            f"queries {q.shape}, keys {k.shape}, angles {cos.shape} and {sin.shape} do not fit"
        )
    with jax.named_scope("rotary"):
        return _IMPLEMENTATIONS[backend](q, k, cos, sin, q_scale=q_scale, num_tokens=num_tokens)


def _reference(
    q: jax.Array,
    k: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    *,
    q_scale: float,
    num_tokens: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Plain jnp, which XLA fuses well enough anywhere but on CPU."""
    del num_tokens
    rotated_q = _rotate(q.astype(jnp.float32), cos, sin) * q_scale
    return rotated_q.astype(q.dtype), _rotate(k.astype(jnp.float32), cos, sin).astype(k.dtype)


def _cpu(
    q: jax.Array,
    k: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    *,
    q_scale: float,
    num_tokens: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """The rotation by XLA on CPU, where a token's bits depend on nothing but the token.

    A rotated number is the sum of two products. XLA may fuse either of them into the addition,
    unrounded, and may choose it by the number of tokens. The barrier keeps the products apart.
    """
    del num_tokens
    rotated_q = _rotate(q.astype(jnp.float32), cos, sin, lax.optimization_barrier) * q_scale
    rotated_k = _rotate(k.astype(jnp.float32), cos, sin, lax.optimization_barrier)
    return rotated_q.astype(q.dtype), rotated_k.astype(k.dtype)


def _rotate(
    x: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    around: Callable[[_Products], _Products] = lambda products: products,
) -> jax.Array:
    """The rotated heads `x` [tokens, heads, head_dim]; `around` is applied to their products."""
    cos, sin = cos[:, None, :], sin[:, None, :]
    first, second = jnp.split(x, 2, axis=-1)
    products = first * cos, second * sin, second * cos, first * sin
    first_cos, second_sin, second_cos, first_sin = around(products)
    return jnp.concatenate((first_cos - second_sin, second_cos + first_sin), axis=-1)


# C++ on CPU, because XLA's fusions would compute the cosines and sines anew in every layer.
_IMPLEMENTATIONS = implementations(_reference, cpu=_cpu, native=calls.rotary)
