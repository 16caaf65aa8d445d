"""The engine role: one engine in this process, with its progress in the terminal."""

from jserve.config import ServeConfig
from jserve.engine.worker.roles import run_engine
from jserve.launch.console import Console
from jserve.launch.jobs import engine_job
from jserve.proto.engine_status import EngineStatus, PhaseProgress, PhaseStarted, Ready


def serve_engine(
    config: ServeConfig, address: str, token: str | None, leader_address: str | None = None
) -> int:
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

    run_engine(engine_job(config, address, token=token, leader_address=leader_address), show)
    return 0
