"""Every static size of an engine, derived once from model, config and measured memory."""

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jserve.core.errors import ConfigError
from jserve.core.step import ProgramKind
from jserve.engine.build.memory import GRID, device_pages, host_available_bytes, host_pages
from jserve.engine.config import EngineConfig
from jserve.engine.group.processes import least_of_all
from jserve.engine.program.batch import BatchShape
from jserve.engine.program.executable_cache import ExecutableCache
from jserve.engine.program.programs import compile_programs
from jserve.engine.program.state import DeviceState, init_state, page_bytes, state_shardings
from jserve.model.functional import Model
from jserve.model.sharding import AnyMesh, param_shardings, stored_kv_heads

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineShape:
    """What fixes the programs of an engine, beside the model."""

    batch: BatchShape
    num_pages: int
    max_model_len: int
    kv_dtype: jnp.dtype
    kv_heads: int  # in a page

    @property
    def pages_per_slot(self) -> int:
        """Width of the page table; whole blocks, so that a block load never leaves it."""
        pages = -(-self.max_model_len // self.batch.page_size)
        return -(-pages // 128) * 128


@dataclass(frozen=True, slots=True)
class DeviceBytes:
    """What one device holds, by what takes it."""

    params: int
    slots: int  # their state, without pages
    page: int  # one page, over all layers
    temporaries: int = 0  # of the largest program
    code: int = 0  # of all programs


def shape_engine(
    model: Model,
    mesh: Mesh,
    config: EngineConfig,
    cache: ExecutableCache | None,
    device_limit_bytes: Callable[[], int] | None = None,
) -> EngineShape:
    """Sizes the engine; `device_limit_bytes` (for tests) replaces what the device says it has.

    Raises ConfigError for a context that the model, or pages that the memory cannot hold.
    """
    least = least_shape(model, mesh, config)
    if config.num_pages:
        num_pages = config.num_pages
    elif config.kv_bytes:
        on_host = mesh.devices.flat[0].platform == "cpu"
        need = device_bytes(model, mesh, least)
        num_pages = host_pages(
            kv_bytes=config.kv_bytes,
            page_bytes=page_bytes(model, config.page_size, least.kv_dtype, least.kv_heads),
            other_bytes=need.params + need.slots,
            available_bytes=host_available_bytes() if on_host else None,
        )
    else:
        limit = device_limit_bytes or (lambda: _device_limit(mesh))
        num_pages = _measured_pages(model, mesh, config, least, cache, limit())
    shape = with_pages(least, config, least_of_all(num_pages))
    if shape.max_model_len < least.max_model_len:
        _log.warning(
            "the context is cut from %d to the %d tokens of all pages",
            least.max_model_len,
            shape.max_model_len,
        )
    return shape


def with_pages(least: EngineShape, config: EngineConfig, num_pages: int) -> EngineShape:
    """The shape with so many pages. Raises ConfigError if they do not hold the config's context."""
    held = num_pages * config.page_size
    if config.max_model_len > held:
        raise ConfigError(
            f"engine.max_model_len is {config.max_model_len}, but all {num_pages} pages hold "
            f"{held} tokens; lower it or raise engine.kv_bytes"
        )
    max_model_len = min(least.max_model_len, held)
    return dataclasses.replace(least, num_pages=num_pages, max_model_len=max_model_len)


def least_shape(model: Model, mesh: AnyMesh, config: EngineConfig) -> EngineShape:
    """The shape with as few pages as there can be. Raises ConfigError for too long a context."""
    spec = model.spec
    max_model_len = config.max_model_len or spec.max_context
    if max_model_len > spec.max_context:
        raise ConfigError(
            f"engine.max_model_len is {max_model_len}; the model's context is {spec.max_context}"
        )
    batch = BatchShape(config.num_slots, spec.vocab, config.page_size, config.processor_rows)
    kv_dtype = jnp.dtype(config.kv_dtype or model.dtype)
    kv_heads = stored_kv_heads(spec, mesh)
    return EngineShape(batch, GRID, max_model_len, kv_dtype, kv_heads)


def abstract_params(model: Model, mesh: AnyMesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, types and shardings of the parameters."""
    shardings = param_shardings(model.param_specs(), model.spec, mesh)
    return {
        name: jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=shardings[name])
        for name, spec in model.param_specs().items()
    }


def make_state(model: Model, shape: EngineShape) -> DeviceState:
    """The state of an idle engine."""
    return init_state(
        model,
        kv_heads=shape.kv_heads,
        num_slots=shape.batch.num_slots,
        num_pages=shape.num_pages,
        page_size=shape.batch.page_size,
        pages_per_slot=shape.pages_per_slot,
        kv_dtype=shape.kv_dtype,
    )


def abstract_state(model: Model, mesh: AnyMesh, shape: EngineShape) -> DeviceState:
    """Shapes, types and shardings of `make_state`."""
    state = jax.eval_shape(lambda: make_state(model, shape))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        state_shardings(state, mesh),
    )


def _device_limit(mesh: Mesh) -> int:
    device = mesh.devices.flat[0]
    stats = device.memory_stats()
    if not stats or "bytes_limit" not in stats:
        raise ConfigError(
            f"engine.kv_bytes is 0, but a {device.platform} device does not tell its memory; "
            "set engine.kv_bytes"
        )
    return int(stats["bytes_limit"])


def _measured_pages(
    model: Model,
    mesh: Mesh,
    config: EngineConfig,
    least: EngineShape,
    cache: ExecutableCache | None,
    limit_bytes: int,
) -> int:
    """Pages beside parameters, the rest of the state, programs and the largest one's temporaries.

    The largest program of each kind is compiled once with few pages to measure it; the cache
    keeps it for the next start.
    """
    params = abstract_params(model, mesh)
    state = abstract_state(model, mesh, least)
    largest = [
        [program for program in config.programs() if program.kind is kind][-1]
        for kind in ProgramKind
    ]
    measured = compile_programs(model, mesh, largest, least.batch, params, state, cache=cache)
    temp_bytes = 0
    code_bytes: dict[ProgramKind, int] = {}
    for program, made in measured.items():
        memory = made.call.memory_analysis()
        if memory is None:
            raise ConfigError("this backend cannot tell what programs need; set engine.kv_bytes")
        temp_bytes = max(temp_bytes, memory.temp_size_in_bytes)
        code_bytes[program.kind] = memory.generated_code_size_in_bytes
    code = sum(code_bytes[program.kind] for program in config.programs())
    need = device_bytes(model, mesh, least, temporaries=temp_bytes, code=code)
    return device_pages(
        limit_bytes=limit_bytes,
        params_bytes=need.params + need.slots,
        program_bytes=need.temporaries + need.code,
        page_bytes=need.page,
    )


def device_bytes(
    model: Model, mesh: AnyMesh, shape: EngineShape, *, temporaries: int = 0, code: int = 0
) -> DeviceBytes:
    """What one device of the mesh holds of an engine of this shape."""
    heads = shape.kv_heads // mesh.size
    return DeviceBytes(
        params=_shard_bytes(abstract_params(model, mesh)),
        slots=_shard_bytes(abstract_state(model, mesh, shape)._replace(kv={})),
        page=page_bytes(model, shape.batch.page_size, shape.kv_dtype, heads),
        temporaries=temporaries,
        code=code,
    )


def _shard_bytes(tree: object) -> int:
    """Bytes of the largest shard of every leaf: what one device holds."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
