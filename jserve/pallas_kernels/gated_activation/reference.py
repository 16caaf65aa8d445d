"""What a gated activation means, in plain jnp; XLA fuses it well."""

import jax

from jserve.pallas_kernels.gated_activation.activation import Activation


def gated_activation(
    gate: jax.Array, up: jax.Array, activation: Activation, num_tokens: jax.Array | None
) -> jax.Array:
    """See `dispatch`."""
    del num_tokens
    if activation is Activation.SILU:
        return jax.nn.silu(gate) * up
    return jax.nn.gelu(gate, approximate=True) * up
