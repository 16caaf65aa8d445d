"""The one entry to rotary embedding: contract and choice of backend."""

import jax
from jaxtyping import Float, Int

from jserve.pallas_kernels.backend import Backend
from jserve.pallas_kernels.rotary import native, reference

_IMPLEMENTATIONS = {
    Backend.REFERENCE: reference.rotary,
    Backend.CPU: reference.rotary,
    Backend.NATIVE: native.rotary,
    Backend.TPU: reference.rotary,
    Backend.GPU: reference.rotary,
}


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
    """Turns every head by its token's angles, in float32, and scales the queries.

    Dimension i turns with i + head_dim / 2 (RoFormer, Su et al., 2021, in Hugging Face's order).
    With `num_tokens` only the first so many tokens mean something: a backend may skip the others.
    """
    tokens, _, head_dim = q.shape
    angles = (tokens, head_dim // 2)
    if head_dim % 2 or k.shape[::2] != q.shape[::2] or cos.shape != angles or sin.shape != angles:
        raise ValueError(
            f"queries {q.shape}, keys {k.shape}, angles {cos.shape} and {sin.shape} do not fit"
        )
    with jax.named_scope("rotary"):
        return _IMPLEMENTATIONS[backend](q, k, cos, sin, q_scale=q_scale, num_tokens=num_tokens)
