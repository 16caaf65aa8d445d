"""The engine child's own duties, without an engine: its job, its status channel, its death."""

import io
import os
import signal
import subprocess
import sys
import time

import pytest

from jserve.engine.job import read_job

# A parent that starts a child which only watches it, and prints the child's pid.
_PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdin=subprocess.PIPE,
                         stdout=subprocess.PIPE, start_new_session=True)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(60)
"""
_CHILD = """
import sys, time
from jserve.engine.worker import child
child._die_with_parent()
print("watching", flush=True)
time.sleep(60)
"""


def test_half_a_job_is_an_error() -> None:
    with pytest.raises(EOFError, match="no job"):
        read_job(io.BytesIO(b""))
    with pytest.raises(EOFError, match="half a job"):
        read_job(io.BytesIO((100).to_bytes(8, "little") + b"short"))


def test_child_ends_when_its_parent_is_killed() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _PARENT, _CHILD], stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout is not None
        child_pid = int(parent.stdout.readline())
        os.kill(child_pid, 0)
        parent.send_signal(signal.SIGKILL)
    deadline_s = time.monotonic() + 10
    while time.monotonic() < deadline_s:
        try:
            with open(f"/proc/{child_pid}/stat") as stat:
                if stat.read().rsplit(")", 1)[1].split()[0] == "Z":
                    return  # dead; whoever adopted it has not reaped it yet
        except FileNotFoundError:
            return
        time.sleep(0.01)
    os.kill(child_pid, signal.SIGKILL)
    pytest.fail("the child outlived its parent")
