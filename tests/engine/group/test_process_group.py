"""A leader's process and the processes it starts, which are stand-ins here."""

import queue
import sys
import threading

import pytest

from jserve import config as config_lib
from jserve.core.errors import ConfigError, EngineError
from jserve.engine import job as engine_job
from jserve.engine.group import process_group
from jserve.engine.job import EngineJob
from jserve.launch import jobs
from jserve.proto import engine_status
from jserve.proto.engine_status import EngineStatus

TWO_PROCESSES = ("engine.tensor_parallel=2", "engine.num_processes=2", "engine.join_timeout_s=0.3")

_READ_JOB = "import sys, time; sys.stdin.buffer.read(8); "


@pytest.fixture
def job() -> EngineJob:
    return jobs.engine_job(config_lib.load("configs/tiny_random.py", TWO_PROCESSES))


@pytest.fixture
def losses(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The reasons for which this process would have ended at once."""
    reasons: list[str] = []
    monkeypatch.setattr(
        process_group, "_end_at_once", lambda reason, report: reasons.append(reason)
    )
    return reasons


def _stand_in(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    monkeypatch.setattr(engine_job, "COMMAND", (sys.executable, "-S", "-c", _READ_JOB + program))


def _fail(*, is_config_error: bool) -> str:
    failed = engine_status.Failed("no such disk", is_config_error)
    return f"print({engine_status.encode(failed).decode()!r}, end=''); sys.exit(2)"


@pytest.mark.parametrize(("is_config_error", "kind"), [(True, ConfigError), (False, EngineError)])
def test_only_a_config_error_of_the_conversion_is_one(
    job: EngineJob,
    monkeypatch: pytest.MonkeyPatch,
    is_config_error: bool,
    kind: type[Exception],
) -> None:
    _stand_in(monkeypatch, _fail(is_config_error=is_config_error))
    with pytest.raises(kind, match="no such disk"):
        process_group._convert(job, lambda status: None)


def test_the_leader_tells_why_a_process_it_started_ended(
    job: EngineJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    _stand_in(monkeypatch, _fail(is_config_error=True))
    ended: queue.SimpleQueue[tuple[int, str]] = queue.SimpleQueue()
    (child,) = process_group._start_followers(job, "127.0.0.1:1", lambda *end: ended.put(end))
    assert ended.get(timeout=30) == (1, "no such disk")
    process_group._end(child)


def test_the_end_of_others_does_not_hide_an_error_of_the_leader(
    job: EngineJob, monkeypatch: pytest.MonkeyPatch, losses: list[str]
) -> None:
    _stand_in(monkeypatch, "time.sleep(60)")
    statuses: list[EngineStatus] = []
    with (
        pytest.raises(EngineError, match=r"processes \[1\] of the engine have not joined"),
        process_group.leading(job, statuses.append),
    ):
        pass
    for thread in threading.enumerate():
        if thread.name == "watch-1":
            thread.join(10)
    assert losses == []
