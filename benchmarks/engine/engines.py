"""Builds the engine that the flags name, and knows what its steps read."""

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.engine.counting import Counter, weights_of
from jserve.checkpoints.config import RandomWeights
from jserve.config import ServeConfig
from jserve.core.errors import ConfigError
from jserve.core.model_spec import ModelSpec
from jserve.engine.build.assembly import Engine, build_engine
from jserve.model.functional import Model
from jserve.model.sharding import device_mesh, param_shardings
from jserve.pallas_kernels.backend import Backend, backend_for

OnProgram = Callable[[str], None]  # called with a program's name by the thread that made it


@dataclass(frozen=True, slots=True)
class Subject:
    """An engine that is measured."""

    engine: Engine
    dtype: jnp.dtype
    counter: Counter


def build(
    serve: ServeConfig, backend: str | None = None, on_program: OnProgram = lambda name: None
) -> Subject:
    """Starts the engine; `backend` names one for random weights. Raises ConfigError."""
    if isinstance(serve.model.source, RandomWeights):
        spec = serve.model.source.spec
        engine = _random(serve, spec, backend, on_program)
    elif backend is not None:
        raise ConfigError("--backend is for random weights; a config takes the best there is")
    else:
        spec, engine = _loaded(serve, on_program)
    return Subject(engine, jnp.dtype(serve.model.dtype.value), _counter(engine, spec))


def device_of(engine: Engine) -> dict[str, Any]:
    """Device and backend of an engine, for the JSON line."""
    device = engine.mesh.devices.flat[0]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "platform": device.platform,
        "kind": device.device_kind,
        "cores": cores,
        "machine": platform.machine(),
        "jax": jax.__version__,
        "backend": engine.backend.value,
    }


def _random(
    serve: ServeConfig, spec: ModelSpec, backend: str | None, on_program: OnProgram
) -> Engine:
    """Starts without any reader of files: this runs on JAX, Flax and NumPy alone."""
    mesh = device_mesh(jax.devices()[:1], model=1)
    dtype = jnp.dtype(serve.model.dtype.value)
    known = [one.value for one in Backend]
    if backend is not None and backend not in known:
        raise ConfigError(f"--backend {backend!r} is not known; one of {known}")
    device = mesh.devices.flat[0]
    best = backend_for(
        device.platform,
        dtype,
        device_kind=device.device_kind,
        head_dim=spec.head_dim,
        page_size=serve.engine.page_size,
    )
    chosen = Backend(backend) if backend else best
    model = Model(spec, dtype, chosen, serve.model.quantization)
    shardings = param_shardings(model.param_specs(), spec, mesh)
    return build_engine(
        serve.model.name,
        model,
        mesh,
        lambda: model.init(0, shardings),
        serve.engine,
        serve.scheduler,
        cache_config=serve.cache,
        cache_folder=Path(serve.model.cache_dir).expanduser(),
        on_program=lambda made: on_program(made.program.name),
    )


def _loaded(serve: ServeConfig, on_program: OnProgram) -> tuple[ModelSpec, Engine]:
    # Imported here: the readers of weights need packages that random weights do not.
    from jserve.engine.build.start import start_engine
    from jserve.model.loading.load import model_spec

    def on_files(done_bytes: int, total_bytes: int) -> None:
        del done_bytes, total_bytes

    def on_phase(phase: str, detail: str) -> None:
        if phase in ("compiled", "loaded"):
            on_program(detail.partition(" in ")[0])

    engine = start_engine(
        serve.model,
        serve.engine,
        serve.scheduler,
        serve.cache,
        on_files=on_files,
        on_phase=on_phase,
    )
    return model_spec(serve.model, on_files), engine


def _counter(engine: Engine, spec: ModelSpec) -> Counter:
    """Bytes come from the arrays themselves, whatever they hold."""
    params, state = engine.executor._params, engine.executor._state
    nbytes = {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf.nbytes
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    kv_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state.kv))
    num_tokens = (engine.shape.num_pages + 1) * engine.info.page_size  # with the null page
    return Counter(
        spec,
        weights_of(nbytes, tied=spec.tied_embeddings),
        kv_bytes / num_tokens / spec.layers,
    )
