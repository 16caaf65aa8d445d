"""The size of an engine, decided once from model, config and measured memory."""

import logging
from collections.abc import Callable

from jax.sharding import Mesh

from jserve.core.errors import ConfigError
from jserve.engine.build.kv_budget import (
    budget_without_programs,
    host_available_bytes,
    measured_budget,
)
from jserve.engine.build.shape import EngineShape, least_shape, with_pages
from jserve.engine.config import EngineConfig
from jserve.engine.group.processes import least_of_all
from jserve.engine.program.executable_cache import ExecutableCache
from jserve.model.functional import Model

_log = logging.getLogger(__name__)


def shape_engine(
    model: Model,
    mesh: Mesh,
    config: EngineConfig,
    cache: ExecutableCache | None,
    device_limit_bytes: Callable[[], int] | None = None,
) -> EngineShape:
    """Sizes the engine; `device_limit_bytes` (for tests) replaces the limit the device reports.

    Raises ConfigError for a context that the model, or pages that the memory cannot hold.
    """
    least = least_shape(model, mesh, config)
    if config.num_pages:
        num_pages = config.num_pages
    elif config.kv_bytes:
        on_host = mesh.devices.flat[0].platform == "cpu"
        num_pages = budget_without_programs(model, mesh, config, least).pages_in_kv_bytes(
            config.kv_bytes, host_available_bytes() if on_host else None
        )
    else:
        limit = device_limit_bytes() if device_limit_bytes else _device_limit(mesh)
        num_pages = measured_budget(model, mesh, config, least, cache).pages_within(limit)
    shape = with_pages(least, config, least_of_all(num_pages))
    if shape.max_model_len < least.max_model_len:
        _log.warning(
            "the context is cut from %d to the %d tokens of all pages",
            least.max_model_len,
            shape.max_model_len,
        )
    return shape


def _device_limit(mesh: Mesh) -> int:
    device = mesh.devices.flat[0]
    stats = device.memory_stats()
    if not stats or "bytes_limit" not in stats:
        raise ConfigError(
            f"engine.kv_bytes is None, but a {device.platform} device does not tell its memory; "
            "set engine.kv_bytes"
        )
    return int(stats["bytes_limit"])
