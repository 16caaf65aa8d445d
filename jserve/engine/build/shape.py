"""Static sizes of an engine, and the shapes of what it holds on its devices."""

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jserve.cache.layout import KVLayout, kv_layout
from jserve.core.errors import ConfigError
from jserve.engine.config import EngineConfig
from jserve.engine.program.batch import BatchShape
from jserve.engine.program.state import StateShape
from jserve.model.functional import Model
from jserve.model.sharding import AnyMesh, param_shardings, stored_kv_heads

GRID = 64  # pages; a small change of free memory must not change a compiled shape


@dataclass(frozen=True, slots=True)
class EngineShape:
    """Static sizes that, with the model, fix the programs of an engine."""

    batch: BatchShape
    num_pages: int
    max_model_len: int
    kv_dtype: jnp.dtype
    kv_heads: int  # stored in a page, copies included
    layout: KVLayout

    @property
    def pages_per_slot(self) -> int:
        """Width of the page table; whole blocks, so that a block load never leaves it."""
        pages = -(-self.max_model_len // self.batch.page_size)
        return -(-pages // 128) * 128

    @property
    def state(self) -> StateShape:
        """The part that fixes the state on the device."""
        return StateShape(
            self.layout,
            self.kv_heads,
            self.batch.num_slots,
            self.num_pages,
            self.pages_per_slot,
            self.kv_dtype,
        )


def with_pages(least: EngineShape, config: EngineConfig, num_pages: int) -> EngineShape:
    """`least` with `num_pages` pages. Raises ConfigError if they hold too few tokens."""
    held = num_pages * config.page_size
    if config.max_model_len is not None and config.max_model_len > held:
        raise ConfigError(
            f"engine.max_model_len is {config.max_model_len}, but all {num_pages} pages hold "
            f"{held} tokens; lower it or raise engine.kv_bytes"
        )
    max_model_len = min(least.max_model_len, held)
    batch = dataclasses.replace(least.batch, pages_per_slot=-(-max_model_len // config.page_size))
    return dataclasses.replace(least, batch=batch, num_pages=num_pages, max_model_len=max_model_len)


def least_shape(model: Model, mesh: AnyMesh, config: EngineConfig) -> EngineShape:
    """The shape with the fewest pages. Raises ConfigError for a context beyond the model's."""
    spec = model.spec
    max_model_len = config.max_model_len or spec.max_context
    if max_model_len > spec.max_context:
        raise ConfigError(
            f"engine.max_model_len is {max_model_len}; the model's context is {spec.max_context}"
        )
    dtype = stored_kv_dtype(config, model.dtype)
    kv_heads = stored_kv_heads(spec, mesh)
    layout = kv_layout(
        spec, page_size=config.page_size, kv_heads=kv_heads, value_bytes=dtype.itemsize
    )
    batch = BatchShape(
        config.num_slots,
        spec.vocab,
        config.page_size,
        config.processor_rows,
        pages_per_slot=-(-max_model_len // config.page_size),
        page_groups=len(layout.groups),
        history_rows=config.processor_rows,
    )
    return EngineShape(batch, GRID, max_model_len, dtype, kv_heads, layout)


def stored_kv_dtype(config: EngineConfig, model_dtype: jnp.dtype) -> jnp.dtype:
    """The type of K and V in pages."""
    return model_dtype if config.kv_dtype is None else jnp.dtype(config.kv_dtype.value)


def abstract_params(model: Model, mesh: AnyMesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, types and shardings of the parameters."""
    shardings = param_shardings(model.param_specs(), model.spec, mesh)
    return {
        name: jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=shardings[name])
        for name, spec in model.param_specs().items()
    }
