"""The one declaration of a parameter, from which loading, sharding and initialization derive.

    form                        shape          made from the form above it by
    ─────────────────────────────────────────────────────────────────────────────────────
    tensors of a checkpoint     source_shape
    float matrix, in host       float_shape    stacking, if the parameter is `stacked`
    native folder, on disk      stored_shape   `encode`, for the codes and scales of quantized
                                               weights
    parameter, on devices       shape          `encode` if `at_load` (panels of a CPU backend),
                                               transposing if the encoding has an `order`

A parameter without an encoding has one shape, but for stacking.
"""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Sharding
from jax.typing import DTypeLike


@dataclass(frozen=True, slots=True)
class Encoding:
    """The way from a float matrix to a parameter: part of a quantized weight, or another layout.

    `encode` runs once, when weights are converted. With `at_load` it runs whenever they are
    loaded, and native folders hold the matrix itself: the layout is one backend's own.
    """

    shape: tuple[int, ...]  # the float matrix's, or the whole stack's
    rows: int  # rows of the matrix that make one row of the parameter
    # Takes a multiple of `rows` rows: float32, or with `at_load` any float type.
    encode: Callable[[np.ndarray], np.ndarray]
    at_load: bool = False
    # Permutes dimensions when the stored array is loaded: dimension i becomes dimension
    # order[i] of the parameter. Empty: none moves.
    order: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ParamSpec:
    """One parameter of a model, before there is an array.

    `axes` names each dimension logically (None: never sharded); `model.sharding` maps the names
    to mesh axes. `source` names the Hugging Face tensor that the parameter is read from; a
    `stacked` parameter is read from several, one after the other along its first axis. `mean` and
    `std` describe random weights, before encoding.
    """

    shape: tuple[int, ...]
    dtype: jnp.dtype
    axes: tuple[str | None, ...]
    source: tuple[str, ...]
    mean: float
    std: float
    encoding: Encoding | None = None
    stacked: bool = False

    @property
    def float_shape(self) -> tuple[int, ...]:
        """Shape before encoding."""
        return self.encoding.shape if self.encoding else self.shape

    @property
    def source_shape(self) -> tuple[int, ...]:
        """Shape of each tensor of `source`."""
        return self.float_shape[1:] if self.stacked else self.float_shape

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape in a native folder."""
        if self.encoding and self.encoding.at_load:
            return self.encoding.shape
        return tuple(self.shape[dimension] for dimension in self.stored_order)

    @property
    def stored_order(self) -> tuple[int, ...]:
        """For each stored dimension, its index in the parameter."""
        if self.encoding and self.encoding.order:
            return self.encoding.order
        stored = self.encoding.shape if self.encoding and self.encoding.at_load else self.shape
        return tuple(range(len(stored)))

    def from_floats(self, floats: np.ndarray) -> np.ndarray:
        """The parameter made from its float matrix, or from the stack of them."""
        return self._transposed(self.encoding.encode(floats)) if self.encoding else floats

    def from_stored(self, stored: np.ndarray) -> np.ndarray:
        """The parameter made from the array in a native folder."""
        if self.encoding and self.encoding.at_load:
            return self.from_floats(stored)
        return self._transposed(stored)

    def _transposed(self, stored: np.ndarray) -> np.ndarray:
        if self.encoding and self.encoding.order:
            return stored.transpose([int(at) for at in np.argsort(self.encoding.order)])
        return stored


def param(
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    dtype: DTypeLike,
    *,
    mean: float = 0.0,
    std: float,
    encoding: Encoding | None = None,
    stacked: bool = False,
) -> nnx.Param:
    """Declares a parameter inside a module: a variable that holds a shape, not yet an array."""
    assert len(shape) == len(axes), (shape, axes)
    return nnx.Param(
        jax.ShapeDtypeStruct(shape, dtype),
        axes=axes,
        mean=mean,
        std=std,
        encoding=encoding,
        stacked=stacked,
    )


def param_specs(module: nnx.Module) -> dict[str, ParamSpec]:
    """Every parameter declared in `module`, by its dotted path, which is its Hugging Face name.

    Parts of a quantized weight have one more word, `.codes` or `.scales`. A stacked parameter
    `experts.up_proj.weight` is read from `experts.0.up_proj.weight`, `experts.1.up_proj.weight`, …
    """
    specs: dict[str, ParamSpec] = {}
    for path, variable in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        name = ".".join(str(part) for part in path)
        declared: Any = variable.get_value()
        meta = variable.get_metadata()
        encoding: Encoding | None = meta["encoding"]
        source = (name.rpartition(".")[0] if encoding and not encoding.at_load else name,)
        if meta["stacked"]:
            owner, *last = source[0].rsplit(".", 2)
            source = tuple(".".join((owner, str(i), *last)) for i in range(declared.shape[0]))
        specs[name] = ParamSpec(
            shape=declared.shape,
            dtype=declared.dtype,
            axes=meta["axes"],
            source=source,
            mean=meta["mean"],
            std=meta["std"],
            encoding=encoding,
            stacked=meta["stacked"],
        )
    return specs


def init_params(
    specs: Mapping[str, ParamSpec], seed: int, shardings: Mapping[str, Sharding] | None = None
) -> dict[str, jax.Array]:
    """Random weights, one small program per distinct shape.

    A parameter depends on the seed and its name only: not on other parameters, nor on the sharding
    (threefry is partitionable), so every layout of one seed is the same model.
    """
    root = jax.random.key(seed)
    params: dict[str, jax.Array] = {}
    for name, spec in specs.items():
        key = jax.random.fold_in(root, zlib.crc32(spec.source[0].encode()))
        sharding = shardings[name] if shardings else None
        if spec.encoding:
            floats = _sampler(spec.float_shape, jnp.dtype(jnp.float32), None)
            host = np.asarray(floats(key, spec.mean, spec.std))
            made = spec.from_floats(host).astype(spec.dtype, copy=False)
            params[name] = _place(made, sharding)
        else:
            sample = _sampler(spec.shape, jnp.dtype(spec.dtype), sharding)
            params[name] = sample(key, spec.mean, spec.std)
    return params


def _place(array: np.ndarray, sharding: Sharding | None) -> jax.Array:
    """Puts this process's part of `array`, which every process has whole, on its devices."""
    if sharding is None:
        return jax.device_put(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda part: array[part])


@cache  # compiled once per shape, not once per layer
def _sampler(
    shape: tuple[int, ...], dtype: jnp.dtype, sharding: Sharding | None
) -> Callable[[jax.Array, float, float], jax.Array]:
    def sample(key: jax.Array, mean: jax.Array, std: jax.Array) -> jax.Array:
        return (mean + std * jax.random.normal(key, shape, jnp.float32)).astype(dtype)

    return jax.jit(sample, out_shardings=sharding)
