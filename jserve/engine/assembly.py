"""Puts an engine together: shapes from the config, programs and parameters side by side."""

import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

import jserve
from jserve.core.errors import ConfigError
from jserve.core.request import EngineInfo
from jserve.engine.batch import BatchShape
from jserve.engine.config import EngineConfig
from jserve.engine.executable_cache import ExecutableCache, code_digest, machine_key
from jserve.engine.executor import DeviceExecutor
from jserve.engine.memory import host_available_bytes, host_pages
from jserve.engine.programs import CompileCounter, CompiledProgram, compile_programs
from jserve.engine.state import DeviceState, init_state, page_bytes
from jserve.engine.step import Params
from jserve.model.functional import Model
from jserve.model.sharding import named_sharding, param_shardings
from jserve.pallas_kernels.backend import Backend, backend_for
from jserve.scheduler.config import SchedulerConfig
from jserve.scheduler.scheduler import Scheduler

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EngineShape:
    """Every static size of an engine, derived once from model and config."""

    batch: BatchShape
    num_pages: int
    max_model_len: int
    backend: Backend

    @property
    def pages_per_slot(self) -> int:
        """Width of the page table; whole blocks, so that a block load never leaves it."""
        pages = -(-self.max_model_len // self.batch.page_size)
        return -(-pages // 128) * 128


@dataclass(frozen=True, slots=True)
class Engine:
    """A ready engine: what a loop needs, and what people want to know of it."""

    info: EngineInfo
    shape: EngineShape
    executor: DeviceExecutor
    scheduler: Scheduler
    programs: tuple[CompiledProgram, ...]
    num_compiles: Callable[[], int]  # since the engine was ready
    phases: dict[str, float] = field(default_factory=dict[str, float])  # seconds


def shape_engine(model: Model, config: EngineConfig) -> EngineShape:
    """Sizes the engine. Raises ConfigError for a context the model or the memory cannot hold."""
    spec = model.spec
    max_model_len = config.max_model_len or spec.max_context
    if max_model_len > spec.max_context:
        raise ConfigError(
            f"engine.max_model_len is {max_model_len}; the model's context is {spec.max_context}"
        )
    num_pages = config.num_pages or host_pages(
        kv_bytes=config.kv_bytes,
        page_bytes=page_bytes(model, config.page_size),
        available_bytes=host_available_bytes(),
    )
    return EngineShape(
        BatchShape(config.num_slots, spec.vocab, config.page_size, config.processor_rows),
        num_pages,
        max_model_len,
        backend_for(jax.default_backend()),
    )


def build_engine(
    name: str,
    model: Model,
    mesh: Mesh,
    load_params: Callable[[], Params],
    config: EngineConfig,
    scheduler_config: SchedulerConfig,
    *,
    cache_folder: Path | None,
    on_program: Callable[[CompiledProgram], None] = lambda _: None,
) -> Engine:
    """Compiles the programs while `load_params` reads the parameters.

    `load_params` returns arrays with the shardings of `model.sharding`.
    """
    shape = shape_engine(model, config)
    abstract = _abstract_params(model, mesh)
    replicated = named_sharding(mesh, ())
    make_state = jax.jit(lambda: _init_state(model, shape), out_shardings=replicated)
    state_shapes: DeviceState = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated),
        jax.eval_shape(lambda: _init_state(model, shape)),
    )
    cache = _cache(cache_folder, model, mesh) if config.cache_executables and cache_folder else None
    counter = CompileCounter()
    phases: dict[str, float] = {}
    with ThreadPoolExecutor(1, thread_name_prefix="load") as pool:
        loading = pool.submit(_timed, load_params)
        started = time.perf_counter()
        programs = compile_programs(
            model,
            config.programs(),
            shape.batch,
            shape.backend,
            abstract,
            state_shapes,
            cache=cache,
            on_ready=on_program,
        )
        state = make_state()
        phases["compile"] = time.perf_counter() - started
        params, phases["load"] = loading.result()
    info = EngineInfo(
        model=name,
        vocab=model.spec.vocab,
        max_model_len=shape.max_model_len,
        num_slots=config.num_slots,
        num_pages=shape.num_pages,
        page_size=config.page_size,
        max_queue=scheduler_config.max_queue,
        eos_token_ids=model.spec.eos_token_ids,
    )
    scheduler = Scheduler(
        scheduler_config,
        num_slots=config.num_slots,
        num_pages=shape.num_pages,
        page_size=config.page_size,
        max_model_len=shape.max_model_len,
        programs=config.programs(),
        max_processor_rows=config.processor_rows,
    )
    executor = DeviceExecutor(params, state, programs, shape.batch, info.eos_token_ids)
    jax.block_until_ready((params, state))
    compiled = counter.count
    return Engine(
        info,
        shape,
        executor,
        scheduler,
        tuple(programs.values()),
        lambda: counter.count - compiled,
        phases,
    )


def _abstract_params(model: Model, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    shardings = param_shardings(model.param_specs(), model.spec, mesh)
    return {
        name: jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=shardings[name])
        for name, spec in model.param_specs().items()
    }


def _init_state(model: Model, shape: EngineShape) -> DeviceState:
    return init_state(
        model,
        num_slots=shape.batch.num_slots,
        num_pages=shape.num_pages,
        page_size=shape.batch.page_size,
        pages_per_slot=shape.pages_per_slot,
    )


def _cache(folder: Path, model: Model, mesh: Mesh) -> ExecutableCache:
    root = Path(jserve.__file__).parent
    traced = [root / name for name in ("core", "engine", "model", "pallas_kernels")]
    key = repr((model.spec, str(jnp.dtype(model.dtype)), code_digest(traced), machine_key()))
    return ExecutableCache(folder / "programs", key, list(mesh.devices.flat))


def _timed(work: Callable[[], Params]) -> tuple[Params, float]:
    started = time.perf_counter()
    done = work()
    return done, time.perf_counter() - started
