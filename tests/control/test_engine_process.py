"""Supervision of real, small child processes: crashes, restarts, stops."""

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from jserve.control.config import ControlConfig
from jserve.control.engine_process import Death, EngineProcess, describe_exit, restart_delay_s
from jserve.core.clock import WallClock
from jserve.core.errors import ConfigError
from jserve.proto.engine_status import EngineStatus, Failed, PhaseStarted, Ready

# A child that speaks the status protocol: it says `ready`, then follows its payload.
_CHILD = """
import json, os, sys, time
def say(kind, **fields):
    print(json.dumps({"kind": kind, **fields}), flush=True)
order = sys.stdin.readline().strip()
say("PhaseStarted", phase="load", detail="")
if order == "refuse":
    say("Failed", message="model.path is wrong", is_config_error=True)
    sys.exit(2)
if order == "die":
    sys.exit(3)
if order == "chatter":
    print("not a status", flush=True)
say("Ready", address="127.0.0.1:1", summary={"pid": str(os.getpid())}, phases={"load": 0.5})
if order == "stubborn":
    import signal
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    say("PhaseStarted", phase="stubborn", detail="")
if order == "live a little":
    time.sleep(0.1)
    os.kill(os.getpid(), 9)
if order == "dump":
    import faulthandler, signal
    faulthandler.register(signal.SIGUSR1, file=open(os.environ["STACKS"], "w"), all_threads=True)
    say("PhaseStarted", phase="watched", detail="")
if order == "crash":
    os.kill(os.getpid(), 9)
time.sleep(60)
"""
_FAST = ControlConfig(restart_delay_s=0.01, max_restart_delay_s=0.02, stop_timeout_s=0.3)


class Watched:
    """An engine process under test and the statuses it has sent."""

    def __init__(self, order: str, config: ControlConfig = _FAST) -> None:
        self.statuses: list[EngineStatus] = []
        self.deaths: list[Death] = []
        self.engine = EngineProcess(
            [sys.executable, "-S", "-c", _CHILD],
            f"{order}\n".encode(),
            config,
            WallClock(),
            self.statuses.append,
            self.deaths.append,
        )

    @property
    def ready_pids(self) -> list[int]:
        return [int(s.summary["pid"]) for s in self.statuses if isinstance(s, Ready)]

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():
                await asyncio.sleep(0.005)


def _run(
    order: str,
    body: Callable[[Watched, asyncio.Task[None]], Awaitable[None]],
    config: ControlConfig = _FAST,
) -> Watched:
    watched = Watched(order, config)

    async def main() -> None:
        task = asyncio.create_task(watched.engine.run())
        try:
            await body(watched, task)
        finally:
            await watched.engine.stop(0)
            with contextlib.suppress(ConfigError):
                await asyncio.wait_for(task, 10)

    asyncio.run(main())
    return watched


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_reports_statuses_in_order() -> None:
    async def body(watched: Watched, task: asyncio.Task[None]) -> None:
        await watched.until(lambda: bool(watched.ready_pids))
        assert watched.statuses[0] == PhaseStarted("load")
        assert watched.engine.pid == watched.ready_pids[0]

    _run("serve", body)


def test_killed_engine_is_started_again() -> None:
    async def body(watched: Watched, task: asyncio.Task[None]) -> None:
        await watched.until(lambda: len(watched.ready_pids) == 1)
        os.kill(watched.ready_pids[0], signal.SIGKILL)
        await watched.until(lambda: len(watched.ready_pids) == 2)
        assert watched.ready_pids[0] != watched.ready_pids[1]
        assert not _is_alive(watched.ready_pids[0])

    watched = _run("serve", body)
    assert watched.deaths == [Death.CRASH]
    assert not _is_alive(watched.ready_pids[1])


def test_engine_that_crashes_again_and_again_is_kept_trying() -> None:
    async def body(watched: Watched, task: asyncio.Task[None]) -> None:
        await watched.until(lambda: len(watched.ready_pids) == 4)
        assert not task.done()

    _run("crash", body)


def test_only_crashes_soon_after_ready_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    async def body(watched: Watched, task: asyncio.Task[None]) -> None:
        await watched.until(lambda: len(watched.deaths) == 4)

    slow = {"restart_delay_s": 0.01, "max_restart_delay_s": 60.0}
    _run("live a little", body, ControlConfig(**slow, healthy_after_s=0.05))
    delays = [record.__dict__["restart_in_s"] for record in caplog.records][:4]
    assert delays == [0.01] * 4
    caplog.clear()
    _run("crash", body, ControlConfig(**slow, healthy_after_s=5.0))
    delays = [record.__dict__["restart_in_s"] for record in caplog.records][:4]
    assert delays == [0.01, 0.02, 0.04, 0.08]


def test_hung_engine_leaves_its_stacks_and_is_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stacks = tmp_path / "stacks"
    monkeypatch.setenv("STACKS", str(stacks))

    async def body(watched: Watched, task: asyncio.Task[None]) -> None:
        await watched.until(lambda: PhaseStarted("watched") in watched.statuses)
        (pid,) = watched.ready_pids
        os.kill(pid, signal.SIGSTOP)
        watched.engine.end_hung()
        watched.engine.end_hung()  # once is enough
        await watched.until(lambda: not _is_alive(pid))
        assert "most recent call first" in stacks.read_text()
        await watched.until(lambda: len(watched.ready_pids) == 2)

    assert _run("dump", body).deaths == [Death.HANG]


def test_a_config_says_first_suspect_then_hung() -> None:
    for values in ({"suspect_s": 0.0}, {"suspect_s": 31.0}, {"suspect_s": float("nan")}):
        with pytest.raises(ConfigError, match=r"control\.suspect_s"):
            ControlConfig(**values)


def test_config_error_is_raised_and_not_retried() -> None:
    async def body(watched: Watched, task: asyncio.Task[None]) -> None:
        with pytest.raises(ConfigError, match=r"model\.path is wrong"):
            await asyncio.wait_for(task, 10)
        assert [type(status) for status in watched.statuses] == [PhaseStarted, Failed]

    _run("refuse", body)


def test_death_before_first_ready_is_an_error_with_the_exit_code() -> None:
    async def body(watched: Watched, task: asyncio.Task[None]) -> None:
        with pytest.raises(ConfigError, match="could not start: exit code 3"):
            await asyncio.wait_for(task, 10)

    _run("die", body)


def test_stop_ends_the_engine_and_run_returns() -> None:
    async def body(watched: Watched, task: asyncio.Task[None]) -> None:
        await watched.until(lambda: bool(watched.ready_pids))
        await watched.engine.stop()
        await asyncio.wait_for(task, 10)
        assert not _is_alive(watched.ready_pids[0])

    assert _run("serve", body).deaths == []


def test_engine_that_ignores_sigterm_is_killed_after_the_timeout() -> None:
    async def body(watched: Watched, task: asyncio.Task[None]) -> None:
        await watched.until(lambda: PhaseStarted("stubborn") in watched.statuses)
        start_s = time.monotonic()
        await watched.engine.stop()
        await asyncio.wait_for(task, 10)
        assert time.monotonic() - start_s >= _FAST.stop_timeout_s
        assert not _is_alive(watched.ready_pids[0])

    _run("stubborn", body)


def test_foreign_output_is_not_a_status() -> None:
    async def body(watched: Watched, task: asyncio.Task[None]) -> None:
        await watched.until(lambda: bool(watched.ready_pids))

    assert len(_run("chatter", body).statuses) == 2


def test_missing_program_is_an_error(tmp_path: Path) -> None:
    engine = EngineProcess(
        [str(tmp_path / "nothing")], b"", _FAST, WallClock(), lambda status: None
    )
    with pytest.raises(FileNotFoundError):
        asyncio.run(engine.run())


def test_delay_doubles_up_to_its_maximum() -> None:
    config = ControlConfig(restart_delay_s=0.5, max_restart_delay_s=30.0)
    delays = [restart_delay_s(crashes, config) for crashes in (1, 2, 3, 6, 7, 1000)]
    assert delays == [0.5, 1.0, 2.0, 16.0, 30.0, 30.0]


def test_exit_codes_read_well() -> None:
    assert describe_exit(1) == "exit code 1"
    assert describe_exit(-signal.SIGSEGV) == "killed by SIGSEGV"
