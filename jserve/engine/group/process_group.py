"""An engine of several processes: the leader gathers followers, all end when one does."""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import logging
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import jserve
from jserve.checkpoints.locate import locate, native_path
from jserve.checkpoints.native_folder import is_native, weights_digest
from jserve.checkpoints.progress import FileProgress
from jserve.core.errors import ConfigError, EngineError
from jserve.core.step import Executor
from jserve.engine import job as engine_job
from jserve.engine.build.assembly import Engine
from jserve.engine.config import Platform
from jserve.engine.executor import LeadingExecutor
from jserve.engine.group.follower import Leader, follow
from jserve.engine.group.leader import Followers
from jserve.engine.group.processes import free_port, join_processes, leave_processes
from jserve.engine.job import EngineJob
from jserve.engine.program.executable_cache import code_digest, cpu_features
from jserve.proto.engine_status import (
    EngineStatus,
    Failed,
    PhaseProgress,
    PhaseStarted,
    decode,
    describe_exit,
)
from jserve.proto.steps import StepReader

_log = logging.getLogger(__name__)
_Report = Callable[[EngineStatus], None]

_STOP_TIMEOUT_S = 10.0  # from the last step to the end of all processes
_ANY_LOOPBACK_PORT = "127.0.0.1:0"


@contextlib.contextmanager
def leading(job: EngineJob, report: _Report) -> Iterator[Callable[[Engine], Executor]]:
    """Wraps the life of an engine: gathers its other processes, and ends them at the end.

    Yields a function from the started engine to the executor that all processes follow; it waits
    until they are ready. If one is lost, this process ends on the spot: its programs would wait
    for the lost one for ever. Without `job.leader_address` the others are started here. Raises
    ConfigError.
    """
    num_processes, address = job.engine.num_processes, job.leader_address
    if num_processes == 1:
        yield lambda engine: engine.executor
        return
    if address is None and job.platform.backend is not Platform.CPU:
        raise ConfigError(
            f"engine.num_processes is {num_processes}: on accelerators each process has a host of "
            "its own; set --leader_address, and start the others with --role=follower"
        )
    weights = _prepare(job, report)
    followers = Followers(
        address or _ANY_LOOPBACK_PORT,
        num_processes - 1,
        _facts(job, weights),
        job.engine.programs(),
        on_loss=lambda reason: _end_at_once(reason, report),
    )
    children: list[subprocess.Popen[bytes]] = []
    stopping = threading.Event()

    def on_exit(process: int, reason: str) -> None:
        if not stopping.is_set():
            _end_at_once(f"process {process} of the engine ended: {reason}", report)

    try:
        if address is None:
            children += _start_followers(job, followers.address, on_exit)
        report(PhaseStarted("waiting", f"for {num_processes - 1} other processes"))
        coordinator = f"{followers.host}:{free_port(followers.host)}"
        followers.start(coordinator, job.engine.join_timeout_s)
        _join(job, 0, coordinator)

        def lead(engine: Engine) -> Executor:
            followers.wait_ready(_engine_facts(engine))
            return LeadingExecutor(engine.executor, followers.publish)

        yield lead
        stopping.set()
        followers.stop(_STOP_TIMEOUT_S)
        leave_processes()
        for child in children:
            child.wait(_STOP_TIMEOUT_S)
    finally:
        stopping.set()  # after an error, too: what others say of their end must not hide it
        followers.close()
        for child in children:
            _end(child)


@contextlib.contextmanager
def following(
    job: EngineJob, address: str, report: _Report
) -> Iterator[Callable[[Engine, Callable[[], None]], None]]:
    """Wraps the life of a follower's engine.

    Yields a function that runs the leader's steps on the started engine until the leader stops,
    and calls back when steps may come. If the leader is lost, this process ends on the spot.
    """
    weights = _prepare(job, report)
    with Leader(
        address,
        job.process,
        _facts(job, weights),
        join_timeout_s=job.engine.join_timeout_s,
        on_loss=lambda reason: _end_at_once(reason, report),
    ) as leader:
        # From now on the end of the leader is the end of this process, too.
        signal.signal(signal.SIGTERM, lambda *_: _end_later(job.drain_s))
        try:
            _join(job, job.process, leader.coordinator_address)

            def run(engine: Engine, on_ready: Callable[[], None]) -> None:
                leader.ready(_engine_facts(engine))
                on_ready()
                follow(engine.executor, StepReader(job.engine.programs()), leader)

            yield run
        except Exception as error:
            leader.failed(f"{type(error).__name__}: {error}")
            raise
        leave_processes()


def _prepare(job: EngineJob, report: _Report) -> str:
    """Makes the model's files complete and returns a digest of its weights.

    A process of its own converts them: one that has joined others cannot write them (see
    `write_native`).
    """
    progress = FileProgress("model files", lambda line: report(PhaseProgress(line)))
    source = locate(job.model, progress)
    if source is None:
        return "random"
    folder = native_path(job.model, source)
    if not is_native(folder):
        _convert(job, report)
    return weights_digest(folder)


def _convert(job: EngineJob, report: _Report) -> None:
    with subprocess.Popen(
        engine_job.COMMAND,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(engine_job.encode_job(dataclasses.replace(job, only_prepare=True)))
        child.stdin.flush()
        for line in child.stdout:
            status = decode(line)
            if isinstance(status, Failed):
                raise (ConfigError if status.is_config_error else EngineError)(status.message)
            report(status)
        code = child.wait()  # before its standard input is closed, which would end it
    if code:
        raise EngineError(f"the model could not be prepared: {describe_exit(code)}")


def _join(job: EngineJob, index: int, coordinator_address: str) -> None:
    on_cpu = job.platform.backend is Platform.CPU
    join_processes(
        coordinator_address,
        index=index,
        num_processes=job.engine.num_processes,
        num_cpu_devices=job.engine.devices_per_process if on_cpu else 1,
        timeout_s=job.engine.join_timeout_s,
    )


def _start_followers(
    job: EngineJob, leader_address: str, on_exit: Callable[[int, str], None]
) -> list[subprocess.Popen[bytes]]:
    """Starts the followers on this machine. They end when the thread that calls this does.

    `on_exit` gets the number of each follower and why it ended, from another thread.
    """
    children: list[subprocess.Popen[bytes]] = []
    for process in range(1, job.engine.num_processes):
        child = subprocess.Popen(
            engine_job.COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert child.stdin is not None
        own = dataclasses.replace(job, process=process, leader_address=leader_address)
        child.stdin.write(engine_job.encode_job(own))
        child.stdin.flush()
        children.append(child)
        threading.Thread(
            target=lambda child, process: on_exit(process, _await_end(child)),
            args=(child, process),
            name=f"watch-{process}",
            daemon=True,
        ).start()
    return children


def _end(child: subprocess.Popen[bytes]) -> None:
    """Kills `child` if it still runs."""
    assert child.stdin is not None
    child.kill()
    child.wait()
    child.stdin.close()


def _await_end(child: subprocess.Popen[bytes]) -> str:
    """Waits for `child` to end and returns why. Its progress reaches the leader by its stream."""
    assert child.stdout is not None
    reason = None
    with child.stdout as lines:
        for line in lines:
            with contextlib.suppress(ValueError):  # not a status
                if isinstance(status := decode(line), Failed):
                    reason = status.message
    code = child.wait()
    return reason or describe_exit(code)


def _end_at_once(reason: str, report: _Report) -> None:
    _log.error("the engine ends", extra={"reason": reason})
    report(Failed(reason, is_config_error=False))
    os._exit(1)


def _end_later(timeout_s: float) -> None:
    """Ends this process after `timeout_s`: until then a leader that drains still needs it."""

    def end() -> None:
        _log.warning("the leader has not ended; this process does", extra={"after_s": timeout_s})
        os._exit(0)

    timer = threading.Timer(timeout_s, end)
    timer.daemon = True
    timer.start()


def _facts(job: EngineJob, weights: str) -> dict[str, str]:
    """Facts that must be equal on all processes before anything is built."""
    packages = ("jax", "jaxlib", "flax", "numpy")
    code = code_digest([Path(jserve.__file__).parent])
    versions = {name: importlib.metadata.version(name) for name in packages}
    return job.fields | versions | {"code": code, "weights": weights}


def _engine_facts(engine: Engine) -> dict[str, str]:
    """Facts that must be equal of the engines as built."""
    programs = ", ".join(made.program.name for made in engine.programs)
    mesh = repr(dict(engine.mesh.shape))
    device = engine.mesh.local_devices[0]
    kind = device.device_kind
    if device.platform == "cpu":
        # Processes that round differently would choose different tokens, and wait for each other.
        kind += f" {hashlib.sha256(repr(cpu_features()).encode()).hexdigest()[:12]}"
    return {
        "info": repr(dataclasses.replace(engine.info, numerics="")),  # of each host for itself
        "shape": repr(engine.shape),
        "programs": programs,
        "mesh": mesh,
        "backend": engine.backend.value,
        "device": kind,
    }
