"""How a model computes: what its layers are built with beside the spec."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import jax.numpy as jnp

from jserve.checkpoints.config import WeightKind
from jserve.model.sharding import AnyMesh, MeshAxes
from jserve.pallas_kernels.backend import Backend


@dataclass(frozen=True, slots=True)
class Numerics:
    """The dtype of parameters and activations, and which implementation of each op runs.

    `mesh` is what kernels that the compiler cannot split are split over; `rules` map logical axes
    to axes of it (see `model.sharding`).
    """

    dtype: jnp.dtype
    backend: Backend
    layers: WeightKind = WeightKind.FLOAT  # weights of layers
    head: WeightKind = WeightKind.FLOAT  # of embedding and head
    mesh: AnyMesh | None = None  # None: one device
    rules: Mapping[str, MeshAxes] = field(default_factory=dict)
