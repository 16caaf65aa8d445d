"""From configs to a ready engine: what the worker process and `offline.py` have in common."""

import dataclasses
import logging
import time
from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
from jax.sharding import Mesh

from jserve.cache.config import CacheConfig
from jserve.checkpoints.config import ModelConfig, check_platform
from jserve.checkpoints.native_folder import weights_digest
from jserve.checkpoints.tensor_source import Progress
from jserve.engine.build.assembly import Engine, build_engine
from jserve.engine.build.shape import stored_kv_dtype
from jserve.engine.config import EngineConfig
from jserve.engine.group.processes import engine_devices
from jserve.engine.program.executable_cache import numerics_digest
from jserve.engine.program.programs import CompiledProgram
from jserve.engine.program.step import Params
from jserve.model.functional import Model
from jserve.model.loading.load import load_params, model_spec, prepare
from jserve.model.sharding import device_mesh, param_shardings, vocab_axes
from jserve.pallas_kernels.backend import backend_for
from jserve.pallas_kernels.ragged_paged_attention.dispatch import backend_for_pages
from jserve.scheduler.config import SchedulerConfig

_log = logging.getLogger(__name__)


def start_engine(
    model_config: ModelConfig,
    config: EngineConfig,
    scheduler_config: SchedulerConfig,
    cache_config: CacheConfig,
    *,
    on_files: Progress,
    on_prepared: Callable[[], None] = lambda: None,
    on_phase: Callable[[str, str], None] = lambda phase, detail: None,
) -> Engine:
    """Fetches what is missing, then converts and loads the weights while programs compile.

    `on_prepared` is called once the model's files are complete, from another thread. Raises
    ConfigError.
    """
    spec = model_spec(model_config, on_files)
    mesh = _mesh(config)
    dtype = jnp.dtype(model_config.dtype.value)
    device = mesh.devices.flat[0]
    platform = device.platform
    check_platform(model_config.quantization, platform)
    backend = backend_for(
        platform,
        dtype,
        mesh.size,
        device_kind=device.device_kind,
        head_dim=spec.head_dim,
        page_size=config.page_size,
    )
    kv_dtype = stored_kv_dtype(config, dtype)
    if backend_for_pages(backend, kv_dtype) is not backend:
        _log.warning("the native attention does not read %s pages; XLA's loops do", kv_dtype)
    model = Model(spec, dtype, backend, model_config.quantization, mesh)
    _warn_of_slow_parts(model, model_config, mesh)
    shardings = param_shardings(model.param_specs(), spec, mesh)
    prepare_s = 0.0
    weights = ""

    def load() -> Params:
        nonlocal prepare_s, weights
        started = time.perf_counter()
        prepared = prepare(model_config, on_files)
        prepare_s = time.perf_counter() - started
        on_prepared()
        weights = repr(prepared) if prepared.folder is None else weights_digest(prepared.folder)
        on_phase("loading", f"{model_config.name} in {model_config.weights}")
        return load_params(prepared, model, shardings)

    def ready(program: CompiledProgram) -> None:
        verb = "loaded" if program.cached else "compiled"
        on_phase(verb, f"{program.program.name} in {program.seconds:.1f} s")

    names = ", ".join(program.name for program in config.programs())
    on_phase("preparing", f"programs {names} (compiled once, then cached)")
    engine = build_engine(
        model_config.name,
        model,
        mesh,
        load,
        config,
        scheduler_config,
        cache_config=cache_config,
        weights_digest=lambda: weights,
        cache_folder=Path(model_config.cache_dir).expanduser(),
        on_program=ready,
    )
    engine.phases["load"] -= prepare_s
    engine.phases["prepare"] = prepare_s
    pages = (kv_dtype, config.page_size)
    numerics = numerics_digest(model, mesh, weights, pages, config.programs())
    return dataclasses.replace(engine, info=dataclasses.replace(engine.info, numerics=numerics))


def _warn_of_slow_parts(model: Model, config: ModelConfig, mesh: Mesh) -> None:
    for name, shape in list(model.unaccelerated_weights().items())[:1]:
        _log.warning(
            "%s and others, %s on a device, have no kernel for %s weights on %s: XLA makes floats "
            "of them in every step",
            name,
            shape,
            config.quantization.value,
            model.backend.value,
        )
    if mesh.size > 1 and not vocab_axes(model.spec.vocab, mesh):
        _log.warning(
            "the vocabulary of %d does not divide over %d devices: each holds and computes all of "
            "the embedding and the head",
            model.spec.vocab,
            mesh.size,
        )


def _mesh(config: EngineConfig) -> Mesh:
    """The mesh of the devices that the engine is spread over. Raises ConfigError for too few."""
    devices = engine_devices(config.tensor_parallel, config.num_processes)
    return device_mesh(devices, **config.mesh_axes)
