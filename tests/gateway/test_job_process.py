"""Processes that run jobs beside the event loop, whatever the jobs are."""

import asyncio
import os
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from jserve.core.errors import JserveError
from jserve.gateway.job_child import LENGTH, Handler
from jserve.gateway.job_process import JobLimits, JobProcesses, JobStopped

LIMITS = JobLimits(cpu_s=5.0, memory_bytes=1 << 30)


def make_handler(start: bytes) -> Handler:
    """Runs in the child: `start` says how."""
    if start == b"broken":
        raise ValueError("no handler can be made")
    return lambda job: start + job


def answer(job: bytes, start: bytes, inspect=lambda processes: None) -> bytes:
    async def main() -> bytes:
        with closing(JobProcesses(__name__, start, LIMITS)) as processes:
            reply = await processes.call(job, "tenant")
            inspect(processes)
            return reply

    return asyncio.run(main())


def test_jobs_leave_the_processor_to_the_event_loop():
    niceness: list[int] = []

    def inspect(processes: JobProcesses) -> None:
        (child,) = processes._all
        niceness.append(os.getpriority(os.PRIO_PROCESS, child.pid))

    assert answer(b"job", b"a ", inspect) == b"a job"
    assert niceness == [min(19, os.getpriority(os.PRIO_PROCESS, 0) + 10)]


@pytest.mark.skipif(not Path("/proc/self/autogroup").exists(), reason="Linux's own")
def test_so_do_they_where_each_session_has_a_share_of_the_processors():
    groups: list[str] = []

    def inspect(processes: JobProcesses) -> None:
        (child,) = processes._all
        groups.append(Path(f"/proc/{child.pid}/autogroup").read_text())

    answer(b"job", b"a ", inspect)
    assert groups[0].endswith(" nice 10\n")


def test_the_traceback_of_a_process_that_ends_is_seen(capfd):
    with pytest.raises((JobStopped, JserveError)):
        answer(b"job", b"broken")
    errors = capfd.readouterr().err
    assert "Traceback" in errors
    assert errors.rstrip().endswith("ValueError: no handler can be made")


def test_a_process_whose_parent_is_gone_says_nothing():
    command = (sys.executable, "-m", "jserve.gateway.job_child", __name__, str(1 << 30), "5.0")
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.close()
        for part in (b"start", b"job"):
            child.stdin.write(LENGTH.pack(len(part)) + part)
        child.stdin.flush()
        assert child.stderr.read() == b""
    assert child.returncode == -signal.SIGPIPE


def test_closing_ends_those_who_wait_for_their_turn():
    async def main():
        processes = JobProcesses(__name__, b"", LIMITS)
        waiting = [asyncio.create_task(processes.call(b"job", "tenant")) for _ in range(3)]
        await asyncio.sleep(0)
        processes.close()
        for result in await asyncio.gather(*waiting, return_exceptions=True):
            assert isinstance(result, (asyncio.CancelledError, JobStopped, JserveError))

    asyncio.run(asyncio.wait_for(main(), 20))
