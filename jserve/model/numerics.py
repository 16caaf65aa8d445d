"""How a model computes: what its layers are built with beside the spec."""

from dataclasses import dataclass

import jax.numpy as jnp

from jserve.pallas_kernels.backend import Backend


@dataclass(frozen=True, slots=True)
class Numerics:
    """The dtype of parameters and activations, and which implementation of each op runs.

    Weights of layers, and of embedding and head, may have fewer bits; 0 is the dtype's.
    """

    dtype: jnp.dtype
    backend: Backend
    layer_bits: int = 0
    head_bits: int = 0
