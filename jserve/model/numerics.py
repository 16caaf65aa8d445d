"""The arithmetic of a model: dtype, backend, kinds of weights, mesh."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import jax.numpy as jnp

from jserve.checkpoints.config import WeightKind
from jserve.model.sharding import AnyMesh, MeshAxes
from jserve.pallas_kernels.backend import Backend


@dataclass(frozen=True, slots=True)
class Numerics:
    """The dtype of parameters and activations, and which implementation of each op runs.

    Kernels that the compiler cannot split are split over `mesh`; `rules` map logical axes to mesh
    axes (see `model.sharding`).
    """

    dtype: jnp.dtype
    backend: Backend
    layers: WeightKind = WeightKind.FLOAT  # kind of the layers' weights
    head: WeightKind = WeightKind.FLOAT  # kind of embedding and head
    mesh: AnyMesh | None = None  # None: one device
    rules: Mapping[str, MeshAxes] = field(default_factory=dict)
