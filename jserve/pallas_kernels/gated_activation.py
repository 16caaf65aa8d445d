"""The gate of feed-forward blocks: activation(gate) · up."""

import enum

import jax
from jaxtyping import Float, Int

from jserve.pallas_kernels.backend import Backend, implementations
from jserve.pallas_kernels.native import calls


class Activation(enum.Enum):
    """The function applied to the gate (Shazeer, 2020)."""

    SILU = "silu"
    GELU_TANH = "gelu_tanh"  # the approximation by tanh


def gated_activation(
    gate: Float[jax.Array, "tokens dim"],
    up: Float[jax.Array, "tokens dim"],
    activation: Activation,
    *,
    num_tokens: Int[jax.Array, ""] | None = None,
    backend: Backend,
) -> Float[jax.Array, "tokens dim"]:
    """Returns activation(gate) · up in the dtype of `gate`.

    With `num_tokens` only the first `num_tokens` tokens mean something: a backend may skip the
    others.
    """
    if gate.shape != up.shape:
        raise ValueError(f"a gate {gate.shape} does not fit {up.shape}")
    with jax.named_scope("gated_activation"):
        return _IMPLEMENTATIONS[backend](
            gate, up, num_tokens, is_silu=activation is Activation.SILU
        )


def _reference(
    gate: jax.Array, up: jax.Array, num_tokens: jax.Array | None, *, is_silu: bool
) -> jax.Array:
    """Plain jnp, which XLA fuses well."""
    del num_tokens
    return (jax.nn.silu(gate) if is_silu else jax.nn.gelu(gate, approximate=True)) * up


_IMPLEMENTATIONS = implementations(_reference, native=calls.gated_activation)
