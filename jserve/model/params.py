"""The one declaration of a parameter, from which loading, sharding and initialization derive."""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Sharding


@dataclass(frozen=True, slots=True)
class ParamSpec:
    """One parameter of a model, before there is an array.

    `axes` names each dimension logically (None: never sharded); `model.sharding` maps the names
    to mesh axes. `source` lists the Hugging Face tensors it is read from, concatenated along
    the first axis if several. `mean` and `std` describe random weights.
    """

    shape: tuple[int, ...]
    dtype: jnp.dtype
    axes: tuple[str | None, ...]
    source: tuple[str, ...]
    mean: float
    std: float


def param(
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    dtype: jnp.dtype,
    *,
    mean: float = 0.0,
    std: float,
) -> nnx.Param:
    """Declares a parameter inside a module: a variable that holds a shape, not yet an array."""
    assert len(shape) == len(axes), (shape, axes)
    return nnx.Param(jax.ShapeDtypeStruct(shape, dtype), axes=axes, mean=mean, std=std)


def param_specs(module: nnx.Module) -> dict[str, ParamSpec]:
    """Every parameter declared in `module` by its dotted path, which is its Hugging Face name."""
    specs: dict[str, ParamSpec] = {}
    for path, variable in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        name = ".".join(str(part) for part in path)
        declared: Any = variable.get_value()
        meta = variable.get_metadata()
        specs[name] = ParamSpec(
            shape=declared.shape,
            dtype=declared.dtype,
            axes=meta["axes"],
            source=(name,),
            mean=meta["mean"],
            std=meta["std"],
        )
    return specs


def init_params(
    specs: Mapping[str, ParamSpec], seed: int, shardings: Mapping[str, Sharding] | None = None
) -> dict[str, jax.Array]:
    """Random weights, one small program per distinct shape.

    A leaf depends on the seed and its name only: not on the other leaves, nor on the sharding
    (threefry is partitionable), so every layout of one seed is the same model.
    """
    root = jax.random.key(seed)
    params: dict[str, jax.Array] = {}
    for name, spec in specs.items():
        key = jax.random.fold_in(root, zlib.crc32(name.encode()))
        sample = _sampler(spec.shape, jnp.dtype(spec.dtype), shardings[name] if shardings else None)
        params[name] = sample(key, spec.mean, spec.std)
    return params


@cache  # compiled once per shape, not once per layer
def _sampler(
    shape: tuple[int, ...], dtype: jnp.dtype, sharding: Sharding | None
) -> Callable[[jax.Array, float, float], jax.Array]:
    def sample(key: jax.Array, mean: float, std: float) -> jax.Array:
        return (mean + std * jax.random.normal(key, shape, jnp.float32)).astype(dtype)

    return jax.jit(sample, out_shardings=sharding)
