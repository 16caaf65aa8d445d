"""The few compiled programs of an engine: made in parallel threads before it is ready."""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jserve.core.step import Program
from jserve.engine.program.batch import BatchShape, layout
from jserve.engine.program.executable_cache import ExecutableCache, load_or_compile
from jserve.engine.program.state import DeviceState
from jserve.engine.program.step import make_step
from jserve.model.functional import Model
from jserve.model.sharding import named_sharding

# Durations, which JAX tells at their ends: a compilation follows the first.
_LOWERED_EVENT = "/jax/core/compile/jaxpr_to_mlir_module_duration"
_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


@dataclass(frozen=True, slots=True)
class CompiledProgram:
    """One program, ready to be called with `(params, state, buffer, masks)`."""

    program: Program
    call: jax.stages.Compiled
    seconds: float  # to trace and compile, or to load
    cached: bool


def compile_programs(
    model: Model,
    mesh: Mesh,
    programs: Sequence[Program],
    shape: BatchShape,
    params: Mapping[str, jax.Array | jax.ShapeDtypeStruct],  # with shardings
    state: DeviceState,  # with shardings
    *,
    cache: ExecutableCache | None,
    on_ready: Callable[[CompiledProgram], None] = lambda _: None,
    threads: int = 2,
) -> dict[Program, CompiledProgram]:
    """Compiles or loads every program, several at a time."""

    def make(program: Program) -> CompiledProgram:
        started = time.perf_counter()
        # State shapes hold the number of pages, which may differ from start to start.
        name = repr((program, shape, jax.tree.map(signature, (params, state))))
        call, cached = load_or_compile(
            cache, name, lambda: lower_step(model, mesh, program, shape, params, state)
        )
        ready = CompiledProgram(program, call, time.perf_counter() - started, cached)
        on_ready(ready)
        return ready

    with ThreadPoolExecutor(threads, thread_name_prefix="compile") as pool:
        return dict(zip(programs, pool.map(make, programs), strict=True))


def lower_step(
    model: Model,
    mesh: Mesh,
    program: Program,
    shape: BatchShape,
    params: Mapping[str, jax.Array | jax.ShapeDtypeStruct],
    state: DeviceState,
) -> jax.stages.Lowered:
    """A program as it is compiled: its state is donated, what it returns is on every device."""
    everywhere = named_sharding(mesh, ())
    size = layout(program, shape).size
    buffer = jax.ShapeDtypeStruct((size,), jnp.int32, sharding=everywhere)
    masks = jax.ShapeDtypeStruct(shape.masks, jnp.int32, sharding=everywhere)
    kept = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = jax.jit(
        make_step(model, mesh, program, shape),
        donate_argnums=1,
        out_shardings=(kept, everywhere),
    )
    return step.lower(params, state, buffer, masks)


def signature(leaf: jax.Array | jax.ShapeDtypeStruct) -> str:
    """The part of one argument or result that a compiled program depends on."""
    return f"{leaf.shape}{leaf.dtype}{getattr(leaf, 'sharding', None)}"


class CompileCounter:
    """Counts XLA compilations of this process. One instance for the life of the process."""

    def __init__(self) -> None:
        self.count = 0
        self.is_compiling = False  # between the events that JAX sends of one compilation
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        del duration_secs, kwargs
        if event == _COMPILE_EVENT:
            self.count += 1
            self.is_compiling = False
        elif event == _LOWERED_EVENT:
            self.is_compiling = True
