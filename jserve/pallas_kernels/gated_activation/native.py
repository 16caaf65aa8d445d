"""Gated activations on CPU in C++, over live rows only: see `native/gated_activation.cc`."""

import jax
import jax.numpy as jnp

from jserve.pallas_kernels.gated_activation.activation import Activation


def gated_activation(
    gate: jax.Array, up: jax.Array, activation: Activation, num_tokens: jax.Array | None
) -> jax.Array:
    """See `dispatch`."""
    count = jnp.int32(gate.shape[0]) if num_tokens is None else num_tokens
    shape = jax.ShapeDtypeStruct(gate.shape, jnp.float32)
    call = jax.ffi.ffi_call("jserve_gated_activation", shape)
    floats = (x.astype(jnp.float32) for x in (gate, up))
    return call(*floats, count, is_silu=activation is Activation.SILU).astype(gate.dtype)
