"""Sharding of parameters: the one table from logical axes to mesh axes."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jserve.core.errors import ConfigError
from jserve.core.model_spec import ModelSpec
from jserve.model.params import ParamSpec

AnyMesh = Mesh | AbstractMesh  # names and sizes of axes are enough
MeshAxes = str | tuple[str, ...] | None  # axes that split one dimension; None: none does

# The axes of every mesh. Only experts tell them apart; everything else is sharded over both, so
# the expert axis does not replicate attention.
DEVICES = ("model", "expert")

# Megatron's split (Shoeybi et al., 2019): heads and FFN columns one way in, the other way out,
# so each block ends in one all-reduce, which the compiler places. `expert` splits the list of
# experts; `model` splits each of them like a dense block.
RULES: dict[str, MeshAxes] = {
    "vocab": DEVICES,
    "q_heads": DEVICES,
    "kv_heads": DEVICES,
    "ffn": DEVICES,
    "experts": "expert",
    "expert_ffn": "model",
}
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
    return Mesh(grid, DEVICES, axis_types=_AXIS_TYPES)


def abstract_mesh(*, model: int, expert: int = 1) -> AbstractMesh:
    """A mesh like `device_mesh` without devices: shapes and shardings can be computed with it."""
    return AbstractMesh((model, expert), DEVICES, axis_types=_AXIS_TYPES)


def axis_rules(spec: ModelSpec, mesh: AnyMesh) -> dict[str, MeshAxes]:
    """`RULES` for one model on one mesh; None replicates.

    KV heads are replicated when there are fewer than devices; then the query heads of one device
    share a KV head: head h · kv_heads // q_heads of the whole model. A vocabulary that does not
    divide is replicated: then every device computes all logits.
    Raises ConfigError naming the size that does not divide.
    """
    rules: dict[str, MeshAxes] = {
        **RULES,
        "vocab": vocab_axes(spec.vocab, mesh) or None,
    }
    sizes = {"q_heads": spec.q_heads, "kv_heads": spec.kv_heads}
    if not spec.experts or not all(map(spec.is_sparse, range(spec.layers))):
        sizes["ffn"] = spec.ffn_dim
    if spec.experts:
        sizes |= {"experts": spec.experts, "expert_ffn": spec.expert_ffn_dim}
    elif mesh.shape["expert"] > 1:
        raise ConfigError(
            f"mesh: {mesh.shape['expert']} devices on axis 'expert', but family {spec.family} "
            "has no experts; set engine.expert_parallel to 1"
        )
    if spec.kv_heads < mesh.size and mesh.size % spec.kv_heads == 0:
        rules["kv_heads"] = None
        del sizes["kv_heads"]
    for name, value in sizes.items():
        axes = RULES[name]
        if value % (over := num_devices(mesh, axes)):
            where = "the mesh" if axes == DEVICES else f"axis '{axes}'"
            raise ConfigError(
                f"mesh: {name} ({value}) of the model does not divide over {over} devices of "
                f"{where}; choose a divisor of {value}"
            )
    return rules


def num_devices(mesh: AnyMesh, axes: MeshAxes) -> int:
    """Number of devices that `axes` split a dimension over."""
    names = (axes,) if isinstance(axes, str) else axes or ()
    return math.prod(mesh.shape[name] for name in names)


def vocab_axes(vocab: int, mesh: AnyMesh) -> tuple[str, ...]:
    """The axes that a vocabulary is split over: none if it does not divide, or on one device."""
    return () if mesh.size == 1 or vocab % mesh.size else DEVICES


def stored_kv_heads(spec: ModelSpec, mesh: AnyMesh) -> int:
    """KV heads in a page: at least one for each device, replicated if the model has fewer."""
    return max(spec.kv_heads, mesh.size)


def named_sharding(
    mesh: AnyMesh,
    axes: Sequence[str | None],
    rules: Mapping[str, MeshAxes] = RULES,
) -> NamedSharding:
    """The sharding of an array whose dimensions have the logical names `axes`."""
    return NamedSharding(mesh, PartitionSpec(*(axis and rules[axis] for axis in axes)))


def param_shardings(
    params: Mapping[str, ParamSpec], spec: ModelSpec, mesh: AnyMesh
) -> dict[str, NamedSharding]:
    """The sharding of every parameter by name; see `axis_rules` for errors.

    A quantized weight is split in panels and groups, which must divide, too.
    """
    rules = axis_rules(spec, mesh)
    for name, param in params.items():
        for size, axis in zip(param.shape, param.axes, strict=True):
            over = num_devices(mesh, axis and rules[axis])
            if size % over:
                raise ConfigError(
                    f"mesh: {name}, stored as {param.shape}, does not divide its {size} over "
                    f"{over} devices; use fewer devices or other weights"
                )
    return {name: named_sharding(mesh, param.axes, rules) for name, param in params.items()}
