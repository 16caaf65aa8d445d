"""How parameters spread over devices: the one table from logical axes to mesh axes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jserve.core.errors import ConfigError
from jserve.model.params import ParamSpec
from jserve.model.spec import ModelSpec

_T = TypeVar("_T")
AnyMesh = Mesh | AbstractMesh  # for what needs names and sizes only

# Megatron's split (Shoeybi et al., 2019): heads and FFN columns one way in, the other way out,
# so each block ends in one all-reduce, which the compiler places.
RULES: dict[str, str] = {
    "vocab": "model",
    "q_heads": "model",
    "kv_heads": "model",
    "ffn": "model",
    "experts": "expert",
}
_AXES = ("model", "expert")
_AXIS_TYPES = (AxisType.Auto, AxisType.Auto)


def device_mesh(devices: Sequence[Any], *, model: int, expert: int = 1) -> Mesh:
    """A mesh of `model` × `expert` JAX devices whose shardings the compiler propagates.

    Raises ConfigError when the sizes do not multiply to the number of devices.
    """
    if model * expert != len(devices):
        raise ConfigError(
            f"mesh: model ({model}) × expert ({expert}) must be the number of devices "
            f"({len(devices)})"
        )
    grid = np.asarray(devices, dtype=object).reshape(model, expert)
    return Mesh(grid, _AXES, axis_types=_AXIS_TYPES)


def abstract_mesh(*, model: int, expert: int = 1) -> AbstractMesh:
    """A mesh like `device_mesh` without devices: shapes and shardings can be computed with it."""
    return AbstractMesh((model, expert), _AXES, axis_types=_AXIS_TYPES)


def axis_rules(spec: ModelSpec, mesh: AnyMesh) -> dict[str, str | None]:
    """`RULES` for one model on one mesh; None replicates.

    KV heads are replicated when there are fewer than devices on the axis; then the query heads
    of one device share a KV head: head h · kv_heads // q_heads of the whole model.
    Raises ConfigError naming the size that does not divide.
    """
    size = mesh.shape["model"]
    rules: dict[str, str | None] = dict(RULES)
    sizes = {
        "vocab": spec.vocab,
        "q_heads": spec.q_heads,
        "kv_heads": spec.kv_heads,
        "ffn": spec.ffn_dim,
    }
    if spec.experts:
        sizes["expert_ffn"] = spec.expert_ffn_dim
    if spec.kv_heads < size and size % spec.kv_heads == 0:
        rules["kv_heads"] = None
        del sizes["kv_heads"]
    for name, value in sizes.items():
        if value % size:
            raise ConfigError(
                f"mesh: {name} ({value}) of the model does not divide over {size} devices of "
                f"axis 'model'; choose a divisor of {value}"
            )
    if spec.experts % mesh.shape["expert"]:
        raise ConfigError(
            f"mesh: experts ({spec.experts}) of the model do not divide over "
            f"{mesh.shape['expert']} devices of axis 'expert'; choose a divisor of {spec.experts}"
        )
    return rules


def stored_kv_heads(spec: ModelSpec, mesh: AnyMesh) -> int:
    """KV heads that the pages hold: one for each device of the axis where there are fewer."""
    return max(spec.kv_heads, mesh.shape["model"])


def on_every_device(mesh: Mesh, function: Callable[..., _T]) -> Callable[..., _T]:
    """`function` of arrays as one device computes it, done by all alike; arguments are gathered."""
    if mesh.size == 1:
        return function
    whole = PartitionSpec()
    return jax.shard_map(function, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False)


def named_sharding(
    mesh: AnyMesh, axes: Sequence[str | None], rules: Mapping[str, str | None] = RULES
) -> NamedSharding:
    """The sharding of an array whose dimensions have the logical names `axes`."""
    return NamedSharding(mesh, PartitionSpec(*(axis and rules[axis] for axis in axes)))


def param_shardings(
    params: Mapping[str, ParamSpec], spec: ModelSpec, mesh: AnyMesh
) -> dict[str, NamedSharding]:
    """The sharding of every parameter by name; see `axis_rules` for errors."""
    rules = axis_rules(spec, mesh)
    return {name: named_sharding(mesh, param.axes, rules) for name, param in params.items()}
