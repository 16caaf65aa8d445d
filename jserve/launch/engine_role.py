"""The engine role: starts an engine, tells how far it is, and serves gateways."""

from collections.abc import Callable

from jserve.config import ServeConfig
from jserve.control.engine_status import (
    EngineStatus,
    ModelPrepared,
    PhaseProgress,
    PhaseStarted,
    Ready,
)
from jserve.engine import worker
from jserve.engine.assembly import Engine
from jserve.engine.start import start_engine
from jserve.launch import replica
from jserve.launch.console import Console, FileProgress
from jserve.model.formats.load import prepare
from jserve.pallas_kernels.backend import Backend


def serve_engine(config: ServeConfig, address: str, leader_address: str | None = None) -> int:
    """Serves in this process until SIGTERM, with progress in the terminal; the exit code."""
    console = Console()

    def show(status: EngineStatus) -> None:
        match status:
            case PhaseStarted(phase, detail):
                console.say(f"{phase} {detail}".rstrip())
            case PhaseProgress(detail):
                console.say(f"  {detail}")
            case Ready():
                console.table(f"the engine is ready on {status.address}", status.summary)
            case _:
                pass

    run_engine(config, address, show, leader_address)
    return 0


def run_engine(
    config: ServeConfig,
    address: str,
    report: Callable[[EngineStatus], None],
    leader_address: str | None = None,
) -> None:
    """Serves until SIGTERM; port 0 takes a free one. The platform must be pinned.

    `leader_address` is where the other processes of the engine find this one; without it they are
    started here.
    """
    host = address.rpartition(":")[0]
    with replica.leading(config, leader_address, report) as lead:
        engine = _start(config, report)
        worker.serve(
            engine,
            lead(engine),
            address,
            drain_timeout_s=config.engine.drain_timeout_s,
            on_ready=lambda port: report(
                Ready(f"{host}:{port}", _summary(config, engine), engine.phases)
            ),
        )


def run_follower(
    config: ServeConfig,
    process: int,
    leader_address: str,
    report: Callable[[EngineStatus], None],
) -> None:
    """Runs the leader's steps until it stops. The platform must be pinned."""
    with replica.following(config, process, leader_address, report) as follow:
        engine = _start(config, report)
        follow(
            engine, lambda: report(Ready(leader_address, _summary(config, engine), engine.phases))
        )


def prepare_model(config: ServeConfig, report: Callable[[EngineStatus], None]) -> None:
    """Fetches and converts what is missing of the model's files."""
    prepare(config.model, _progress(report))


def _progress(report: Callable[[EngineStatus], None]) -> FileProgress:
    return FileProgress("model files", lambda line: report(PhaseProgress(line)))


def _start(config: ServeConfig, report: Callable[[EngineStatus], None]) -> Engine:
    return start_engine(
        config.model,
        config.engine,
        config.scheduler,
        on_files=_progress(report),
        on_prepared=lambda: report(ModelPrepared()),
        on_phase=lambda phase, detail: report(PhaseStarted(phase, detail)),
    )


def _summary(config: ServeConfig, engine: Engine) -> dict[str, str]:
    info = engine.info
    programs = " ".join(
        f"{made.program.name}{'' if made.cached else f' {made.seconds:.1f} s'}"
        for made in engine.programs
    )
    return {
        "backend": _backend(config, engine),
        "mesh": _mesh(config, engine),
        "context": f"{info.max_model_len} tokens",
        "slots": str(info.num_slots),
        "pages": f"{info.num_pages} of {info.page_size} tokens in {engine.shape.kv_dtype}",
        "queue": str(info.max_queue),
        "programs": programs,
    }


def _mesh(config: ServeConfig, engine: Engine) -> str:
    axes = ", ".join(f"{axis} {size}" for axis, size in engine.mesh.shape.items())
    processes = config.engine.num_processes
    return axes if processes == 1 else f"{axes}; over {processes} processes"


def _backend(config: ServeConfig, engine: Engine) -> str:
    parts = [engine.backend.value, config.model.dtype]
    if config.model.quantization != "none":
        parts.append(f"weights {config.model.quantization}")
    if engine.backend is Backend.CPU:
        parts[0] = "XLA's own code, without the native CPU kernels"
    return ", ".join(parts)
