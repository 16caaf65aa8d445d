"""Puts an engine together: shapes from the config, programs and parameters side by side."""

import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import jax
from jax.sharding import Mesh

from jserve.cache.config import CacheConfig
from jserve.cache.kv_cache import KVCache
from jserve.core.request import EngineInfo
from jserve.core.step import Program
from jserve.engine.build.shape import EngineShape, abstract_params
from jserve.engine.build.sharing import prefix_sharing
from jserve.engine.build.sizing import shape_engine
from jserve.engine.config import EngineConfig
from jserve.engine.executor import DeviceExecutor
from jserve.engine.program.executable_cache import (
    ExecutableCache,
    load_or_compile,
    open_cache,
)
from jserve.engine.program.kv_scales import lower_kv_scales
from jserve.engine.program.page_mover import PageMover
from jserve.engine.program.page_moves import compile_moves
from jserve.engine.program.programs import (
    CompileCounter,
    CompiledProgram,
    compile_programs,
    signature,
)
from jserve.engine.program.state import DeviceState, abstract_state, lower_state
from jserve.engine.program.step import Params
from jserve.model.functional import Model
from jserve.pallas_kernels.backend import Backend
from jserve.scheduler.config import SchedulerConfig
from jserve.scheduler.scheduler import Scheduler

CACHE_DEFAULTS = CacheConfig()

_A = TypeVar("_A")
_B = TypeVar("_B")


@dataclass(frozen=True, slots=True)
class Engine:
    """A ready engine: what a loop needs, and what people want to know of it."""

    info: EngineInfo
    mesh: Mesh
    backend: Backend
    shape: EngineShape
    executor: DeviceExecutor
    scheduler: Scheduler
    programs: tuple[CompiledProgram, ...]
    num_compiles: Callable[[], int]  # since the engine was ready
    is_compiling: Callable[[], bool]  # in any thread
    phases: dict[str, float] = field(default_factory=dict[str, float])  # seconds


def build_engine(
    name: str,
    model: Model,
    mesh: Mesh,
    load_params: Callable[[], Params],
    config: EngineConfig,
    scheduler_config: SchedulerConfig,
    *,
    cache_config: CacheConfig = CACHE_DEFAULTS,
    weights_digest: Callable[[], str] = str,
    cache_folder: Path | None,
    on_program: Callable[[CompiledProgram], None] = lambda _: None,
) -> Engine:
    """Compiles the programs while `load_params` reads the parameters.

    `load_params` returns arrays with the shardings of `model.sharding`; after it, `weights_digest`
    returns the digest of the weights.
    """
    cache = None
    if config.cache_executables and cache_folder:
        cache = open_cache(cache_folder / "programs", model, mesh)
    shape = shape_engine(model, mesh, config, cache)
    counter = CompileCounter()

    def compile_all() -> tuple[dict[Program, CompiledProgram], Callable[[Params], DeviceState]]:
        programs = compile_programs(
            model,
            mesh,
            config.programs(),
            shape.batch,
            abstract_params(model, mesh),
            abstract_state(model, mesh, shape.state),
            cache=cache,
            on_ready=on_program,
        )
        return programs, _idle_state(model, mesh, shape, cache)

    (params, load_s), (made, compile_s) = _side_by_side(load_params, compile_all)
    programs, idle_state = made
    state = idle_state(params)
    mover = None
    if config.host_pages:
        moves = compile_moves(state.kv, cache)
        mover = PageMover(moves, state.kv, config.host_pages)
    weights = weights_digest()
    info = EngineInfo(
        model=name,
        vocab=model.spec.vocab,
        max_model_len=shape.max_model_len,
        num_slots=config.num_slots,
        num_pages=shape.num_pages,
        page_size=config.page_size,
        max_queue=scheduler_config.max_queue,
        eos_token_ids=model.spec.eos_token_ids,
        weights=weights,
        kv_dtype=str(shape.kv_dtype),
    )
    scheduler = Scheduler(
        scheduler_config,
        cache=KVCache(
            shape.layout,
            shape.num_pages,
            prefix_sharing(cache_config, model, shape.kv_dtype, weights),
        ),
        num_slots=config.num_slots,
        max_model_len=shape.max_model_len,
        programs=config.programs(),
        max_processor_rows=config.processor_rows,
        eos_token_ids=info.eos_token_ids,
    )
    executor = DeviceExecutor(params, state, programs, shape.batch, info.eos_token_ids, mover)
    jax.block_until_ready((params, state))
    compiled, counter.is_compiling = counter.count, False  # programs may have been lowered alone
    return Engine(
        info,
        mesh,
        model.backend,
        shape,
        executor,
        scheduler,
        tuple(programs.values()),
        lambda: counter.count - compiled,
        lambda: counter.is_compiling,
        {"compile": compile_s, "load": load_s},
    )


def _idle_state(
    model: Model, mesh: Mesh, shape: EngineShape, cache: ExecutableCache | None
) -> Callable[[Params], DeviceState]:
    """Prepares a function from the parameters to the state of an idle engine.

    A small cached program makes the state on the device; for 8-bit pages another one measures
    their scales.
    """
    abstract = abstract_state(model, mesh, shape.state)
    name = repr(("state", jax.tree.map(signature, abstract)))
    idle = load_or_compile(cache, name, lambda: lower_state(model, mesh, shape.state)).call
    if shape.kv_dtype.itemsize > 1:
        state = idle()
        return lambda params: state
    params = abstract_params(model, mesh)
    name = repr(("kv_scales", jax.tree.map(signature, params)))
    measure = load_or_compile(cache, name, lambda: lower_kv_scales(model, mesh, params)).call

    def measured(params: Params) -> DeviceState:
        scales = jax.block_until_ready(measure(params))  # in memory that the pages take after it
        return idle()._replace(kv_scales=scales)

    return measured


def _side_by_side(
    first: Callable[[], _A], second: Callable[[], _B]
) -> tuple[tuple[_A, float], tuple[_B, float]]:
    """Results and seconds of both, run at once. A failure of one does not wait for the other."""
    pool = ThreadPoolExecutor(2, thread_name_prefix="start")
    try:
        one = pool.submit(_timed, first)
        two = pool.submit(_timed, second)
        futures: list[Future[Any]] = [one, two]
        for future in wait(futures, return_when=FIRST_EXCEPTION).done:
            future.result()
        return one.result(), two.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _timed(work: Callable[[], _A]) -> tuple[_A, float]:
    started = time.perf_counter()
    done = work()
    return done, time.perf_counter() - started
