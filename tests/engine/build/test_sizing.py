"""Number of pages that an engine takes, by config or by the measured need of its programs."""

import math
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jserve.core.errors import ConfigError
from jserve.engine.build import assembly
from jserve.engine.build.assembly import build_engine
from jserve.engine.build.kv_budget import KVBudget, budget_without_programs, page_bytes
from jserve.engine.build.shape import least_shape
from jserve.engine.build.sizing import shape_engine
from jserve.engine.config import EngineConfig
from jserve.engine.program.executable_cache import ExecutableCache
from jserve.model.functional import Model
from jserve.model.sharding import device_mesh
from jserve.scheduler.config import SchedulerConfig
from tests.engine.engine_harness import TINY

MODEL = Model(TINY, jnp.float32)
MESH = device_mesh(jax.devices()[:1], model=1)
SMALL = {"num_slots": 4, "page_size": 8, "mixed_tokens": (8,), "decode_rows": (4,)}


def test_pages_of_the_config_come_first() -> None:
    config = EngineConfig(**SMALL, num_pages=77, kv_bytes=1 << 20)
    assert shape_engine(MODEL, MESH, config, None).num_pages == 77


def test_kv_bytes_are_filled_to_whole_grids() -> None:
    config = EngineConfig(
        **SMALL, kv_bytes=300 * page_bytes(MODEL, 8, MODEL.dtype, MODEL.spec.kv_heads)
    )
    assert shape_engine(MODEL, MESH, config, None).num_pages == 256


def test_host_memory_also_holds_what_pages_leave_it_for() -> None:
    """Pages of the devices, those of the host, and the payloads between them."""
    page = page_bytes(MODEL, 8, MODEL.dtype, MODEL.spec.kv_heads)
    config = EngineConfig(**SMALL, host_pages=500)
    least = least_shape(MODEL, MESH, config)
    plain = budget_without_programs(MODEL, MESH, EngineConfig(**SMALL), least)
    budget = budget_without_programs(MODEL, MESH, config, least)
    assert budget.fixed == plain.fixed + 64 * page
    room = math.ceil((plain.fixed + 1000 * page) / 0.9)
    assert plain.pages_in_kv_bytes(1 << 40, room) == 960  # whole grids
    assert budget.pages_in_kv_bytes(1 << 40, room) == 384  # of 436
    assert budget.pages_in_kv_bytes(100 * page, room) == 64
    with pytest.raises(ConfigError, match=r"lower engine\.host_pages"):
        budget.pages_in_kv_bytes(1 << 40, room - 500 * page)


def test_a_process_counts_its_own_devices() -> None:
    budget = KVBudget(params=1000, slots=0, page=10, devices=4, local_devices=2)
    assert budget.pages_in_kv_bytes(40 * 63) == 63
    available = math.ceil((2 * 1000 + 2 * 10 * 63) / 0.9)
    assert budget.pages_in_kv_bytes(1 << 40, available) == 63


def test_the_device_is_filled_but_not_overfilled(tmp_path: Path) -> None:
    config = EngineConfig(**SMALL, kv_bytes=None)
    limit = 64 << 20
    cache = ExecutableCache(tmp_path, "tiny", list(MESH.devices.flat))  # measured once
    pages = shape_engine(MODEL, MESH, config, cache, lambda: limit).num_pages
    params = sum(4 * math.prod(spec.shape) for spec in MODEL.param_specs().values())
    used = params + pages * page_bytes(MODEL, 8, MODEL.dtype, MODEL.spec.kv_heads)
    assert used < limit
    assert limit - used < 8 << 20  # temporaries, slots and less than a grid of pages
    with pytest.raises(ConfigError, match="no KV page fits"):
        shape_engine(MODEL, MESH, config, cache, lambda: params)


def test_a_device_that_tells_nothing_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"set engine\.kv_bytes"):
        shape_engine(MODEL, MESH, EngineConfig(**SMALL, kv_bytes=None), None)


def test_a_context_beyond_the_model_is_refused() -> None:
    config = EngineConfig(**SMALL, max_model_len=100_000)
    with pytest.raises(ConfigError, match="context is 512"):
        shape_engine(MODEL, MESH, config, None)


def test_wrong_weights_are_told_before_the_programs_are_compiled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = threading.Event()
    compiled: list[bool] = []

    def load() -> dict[str, jax.Array]:
        raise ConfigError("model.gguf: tensor 'x' is missing")

    def compile_slowly(*arguments: object, **options: object) -> None:
        compiled.append(told.wait(60))

    monkeypatch.setattr(assembly, "compile_programs", compile_slowly)
    with pytest.raises(ConfigError, match="'x' is missing"):
        build_engine(
            "tiny",
            MODEL,
            MESH,
            load,
            EngineConfig(**SMALL, num_pages=64),
            SchedulerConfig(),
            cache_folder=None,
        )
    assert not compiled
    told.set()
