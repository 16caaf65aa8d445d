"""The one declaration of a parameter, from which loading, sharding and initialization derive."""

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


@dataclass(frozen=True, slots=True)
class Encoding:
    """How a parameter is made of a float matrix: part of a quantized weight, or another layout.

    It is made once, when weights are converted, unless `at_load`: then native folders hold the
    matrix itself, because the layout is that of one backend. With an `order` dimensions are put in
    another one at load, on devices: it tells which of the parameter's are those before.
    """

    shape: tuple[int, ...]  # of the float matrix, or of a stack of them
    rows: int  # of it that make one row of the parameter
    encode: Callable[[np.ndarray], np.ndarray]  # of whole such rows, float32; at load: of any float
    at_load: bool = False
    order: tuple[int, ...] = ()  # empty: the same ones


@dataclass(frozen=True, slots=True)
class ParamSpec:
    """One parameter of a model, before there is an array.

    `axes` names each dimension logically (None: never sharded); `model.sharding` maps the names
    to mesh axes. `source` names the Hugging Face tensor it is read from, or, if `stacked`, the
    tensors that it holds one after the other along its first axis; with an `encoding` that is
    its float matrix. `mean` and `std` describe random weights, before encoding.
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
        """Before encoding."""
        return self.encoding.shape if self.encoding else self.shape

    @property
    def source_shape(self) -> tuple[int, ...]:
        """Of each of the tensors it is read from."""
        return self.float_shape[1:] if self.stacked else self.float_shape

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """In a native folder."""
        if self.encoding and self.encoding.at_load:
            return self.encoding.shape
        return tuple(self.shape[dimension] for dimension in self.stored_order)

    @property
    def stored_order(self) -> tuple[int, ...]:
        """The parameter's dimensions that are those of what a native folder holds."""
        if self.encoding and self.encoding.order:
            return self.encoding.order
        stored = self.encoding.shape if self.encoding and self.encoding.at_load else self.shape
        return tuple(range(len(stored)))

    def from_floats(self, floats: np.ndarray) -> np.ndarray:
        """The parameter, made of the float matrix, or of the stack of them."""
        return self._ordered(self.encoding.encode(floats)) if self.encoding else floats

    def from_stored(self, stored: np.ndarray) -> np.ndarray:
        """The parameter, made of what a native folder holds."""
        if self.encoding and self.encoding.at_load:
            return self.from_floats(stored)
        return self._ordered(stored)

    def _ordered(self, stored: np.ndarray) -> np.ndarray:
        if self.encoding and self.encoding.order:
            return stored.transpose([int(at) for at in np.argsort(self.encoding.order)])
        return stored


def param(
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    dtype: jnp.dtype,
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
    """Every parameter declared in `module` by its dotted path, which is its Hugging Face name.

    The parts of a quantized one have a word more. A stacked one, `experts.up_proj.weight`, is
    made of `experts.0.up_proj.weight` and so on, in parts or not.
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

    A leaf depends on the seed and its name only: not on the other leaves, nor on the sharding
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
    """On this process's devices, its part of an array that every process has whole."""
    if sharding is None:
        return jax.device_put(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda part: array[part])


@cache  # compiled once per shape, not once per layer
def _sampler(
    shape: tuple[int, ...], dtype: jnp.dtype, sharding: Sharding | None
) -> Callable[[jax.Array, float, float], jax.Array]:
    def sample(key: jax.Array, mean: float, std: float) -> jax.Array:
        return (mean + std * jax.random.normal(key, shape, jnp.float32)).astype(dtype)

    return jax.jit(sample, out_shardings=sharding)
