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
from jserve.launch.console import Console, FileProgress
from jserve.pallas_kernels.backend import Backend


def serve_engine(config: ServeConfig, address: str) -> int:
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

    run_engine(config, address, show)
    return 0


def run_engine(config: ServeConfig, address: str, report: Callable[[EngineStatus], None]) -> None:
    """Serves until SIGTERM; port 0 takes a free one. The platform must be pinned."""
    host = address.rpartition(":")[0]
    engine = start_engine(
        config.model,
        config.engine,
        config.scheduler,
        on_files=FileProgress("model files", lambda line: report(PhaseProgress(line))),
        on_prepared=lambda: report(ModelPrepared()),
        on_phase=lambda phase, detail: report(PhaseStarted(phase, detail)),
    )
    worker.serve(
        engine,
        address,
        drain_timeout_s=config.engine.drain_timeout_s,
        on_ready=lambda port: report(
            Ready(f"{host}:{port}", _summary(config, engine), engine.phases)
        ),
    )


def _summary(config: ServeConfig, engine: Engine) -> dict[str, str]:
    info = engine.info
    programs = " ".join(
        f"{made.program.name}{'' if made.cached else f' {made.seconds:.1f} s'}"
        for made in engine.programs
    )
    return {
        "backend": _backend(config, engine),
        "mesh": ", ".join(f"{axis} {size}" for axis, size in engine.mesh.shape.items()),
        "context": f"{info.max_model_len} tokens",
        "slots": str(info.num_slots),
        "pages": f"{info.num_pages} of {info.page_size} tokens in {engine.shape.kv_dtype}",
        "queue": str(info.max_queue),
        "programs": programs,
    }


def _backend(config: ServeConfig, engine: Engine) -> str:
    parts = [engine.backend.value, config.model.dtype]
    if config.model.quantization != "none":
        parts.append(f"weights {config.model.quantization}")
    if engine.backend is Backend.CPU:
        parts[0] = "XLA's own code, without the native CPU kernels"
    return ", ".join(parts)
