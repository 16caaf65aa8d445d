"""The one entry to gated activations: contract and choice of backend."""

import jax
from jaxtyping import Float, Int

from jserve.pallas_kernels.backend import Backend
from jserve.pallas_kernels.gated_activation import native, reference
from jserve.pallas_kernels.gated_activation.activation import Activation

_IMPLEMENTATIONS = {
    Backend.REFERENCE: reference.gated_activation,
    Backend.CPU: reference.gated_activation,
    Backend.NATIVE: native.gated_activation,
    Backend.TPU: reference.gated_activation,
    Backend.GPU: reference.gated_activation,
}


def gated_activation(
    gate: Float[jax.Array, "tokens dim"],
    up: Float[jax.Array, "tokens dim"],
    activation: Activation,
    *,
    num_tokens: Int[jax.Array, ""] | None = None,
    backend: Backend,
) -> Float[jax.Array, "tokens dim"]:
    """activation(gate) · up in the dtype of `gate`.

    With `num_tokens` only the first so many tokens mean something: a backend may skip the others.
    """
    if gate.shape != up.shape:
        raise ValueError(f"a gate {gate.shape} does not fit {up.shape}")
    with jax.named_scope("gated_activation"):
        return _IMPLEMENTATIONS[backend](gate, up, activation, num_tokens)
