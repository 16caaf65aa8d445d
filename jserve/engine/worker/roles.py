"""The parts that an engine process can take: engine, follower, or preparing the model's files."""

from collections.abc import Callable

from jserve.checkpoints.config import Dtype, Quantization
from jserve.checkpoints.locate import text_assets_from_config
from jserve.checkpoints.progress import FileProgress
from jserve.engine.build.assembly import Engine
from jserve.engine.build.start import start_engine
from jserve.engine.config import Platform
from jserve.engine.group import process_group
from jserve.engine.job import EngineJob
from jserve.engine.step_log import open_step_log
from jserve.engine.worker import worker
from jserve.grammar.maker import ConstraintMaker
from jserve.model.loading.load import prepare
from jserve.pallas_kernels.backend import Backend
from jserve.proto.engine_status import (
    EngineStatus,
    ModelPrepared,
    PhaseProgress,
    PhaseStarted,
    Ready,
)

Report = Callable[[EngineStatus], None]


def run_engine(job: EngineJob, report: Report) -> None:
    """Serves gateways, and leads the engine's other processes if any, until SIGTERM.

    The platform must be pinned.
    """
    step_log = open_step_log(job.engine)
    with process_group.leading(job, report) as lead:
        engine = _start(job, report)
        worker.serve(
            engine,
            lead(engine),
            job.address,
            drain_timeout_s=job.engine.drain_timeout_s,
            step_log=step_log,
            on_ready=lambda address: report(Ready(address, _summary(job, engine), engine.phases)),
            token=job.token,
            constrain=_constraints(job, engine).make,
        )


def _constraints(job: EngineJob, engine: Engine) -> ConstraintMaker:
    def tokenizer_json() -> str:
        assets = text_assets_from_config(job.model, lambda done_bytes, total_bytes: None)
        return assets.tokenizer_json

    info = engine.info
    return ConstraintMaker(tokenizer_json, vocab=info.vocab, eos_token_ids=info.eos_token_ids)


def run_follower(job: EngineJob, report: Report) -> None:
    """Runs the leader's steps until it stops. The platform must be pinned."""
    leader_address = job.leader_address
    assert leader_address is not None
    with process_group.following(job, leader_address, report) as follow:
        engine = _start(job, report)
        follow(engine, lambda: report(Ready(leader_address, _summary(job, engine), engine.phases)))


def prepare_model(job: EngineJob, report: Report) -> None:
    """Fetches and converts what is missing of the model's files."""
    prepare(job.model, _progress(report))


def _progress(report: Report) -> FileProgress:
    return FileProgress("model files", lambda line: report(PhaseProgress(line)))


def _start(job: EngineJob, report: Report) -> Engine:
    return start_engine(
        job.model,
        job.engine,
        job.scheduler,
        job.cache,
        on_files=_progress(report),
        on_prepared=lambda: report(ModelPrepared()),
        on_phase=lambda phase, detail: report(PhaseStarted(phase, detail)),
    )


def _summary(job: EngineJob, engine: Engine) -> dict[str, str]:
    info = engine.info
    programs = " ".join(
        f"{made.program.name}{'' if made.cached else f' {made.seconds:.1f} s'}"
        for made in engine.programs
    )
    return {
        "backend": _backend(job, engine),
        "mesh": _mesh(job, engine),
        "context": f"{info.max_model_len} tokens",
        "slots": str(info.num_slots),
        "pages": f"{info.num_pages} of {info.page_size} tokens in {engine.shape.kv_dtype}",
        "queue": str(info.max_queue),
        "programs": programs,
    }


def _mesh(job: EngineJob, engine: Engine) -> str:
    axes = ", ".join(f"{axis} {size}" for axis, size in engine.mesh.shape.items())
    processes = job.engine.num_processes
    return axes if processes == 1 else f"{axes}; over {processes} processes"


def _backend(job: EngineJob, engine: Engine) -> str:
    parts = [engine.backend.value, job.model.dtype.value]
    if job.model.quantization is not Quantization.NONE:
        parts.append(f"weights {job.model.weights}")
    if engine.backend is Backend.CPU:
        parts[0] = "XLA's own code, without the native CPU kernels"
        if (job.platform.backend, job.model.dtype) == (Platform.CPU, Dtype.BFLOAT16):
            parts.append("bfloat16 matmuls in float32")
    return ", ".join(parts)
