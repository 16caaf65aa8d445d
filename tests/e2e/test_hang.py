"""An engine that hangs: noticed, told, its stacks written, ended, started again."""

import os
import re
import signal
import time
from collections.abc import Iterator

import psutil
import pytest

from tests.e2e.faults import FOREVER, start_reader
from tests.e2e.server import Server, serving

CONFIG = "configs/tiny_random.py"


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    limits = ("--set=control.suspect_s=1", "--set=control.hang_s=3")
    with serving(CONFIG, tmp_path_factory.mktemp("hang") / "log", *limits) as server:
        yield server


def test_stopped_engine_is_suspected_given_up_and_replaced(hasty: Server) -> None:
    pages = hasty.gauge("jserve_free_pages")
    engine = psutil.Process(hasty.engine_pid)
    reader = start_reader(hasty, FOREVER)
    stopped_s = time.monotonic()
    os.kill(engine.pid, signal.SIGSTOP)
    hasty.until(lambda: not hasty.is_ready(), 3)
    assert time.monotonic() - stopped_s > 0.7  # it counts from the last step
    assert hasty.get("/health").status_code == 200
    assert hasty.gauge("jserve_seconds_since_step") >= 1
    refused = hasty.post("/v1/completions", {"prompt": "x", "max_tokens": 1})
    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) >= 1
    reader.join(10)
    assert reader.ended_at_s - stopped_s > 2
    assert reader.error["type"] == "service_unavailable_error"
    assert "send it again" in reader.error["message"]
    engine.wait(10)
    assert re.search(r'Current thread|Thread 0x[0-9a-f]+ .*\n  File "', hasty.output)
    assert "in _serve" in hasty.output or "loop.py" in hasty.output
    hasty.until(hasty.is_ready)
    assert hasty.gauge("jserve_seconds_since_step") == 0
    assert 'reason="hang"} 1.0' in hasty.get("/metrics").text
    assert hasty.post("/v1/completions", {"prompt": "x", "max_tokens": 4}).status_code == 200
    assert hasty.gauge("jserve_free_pages") == pages


def test_a_short_stop_harms_nobody(hasty: Server) -> None:
    pid = hasty.engine_pid
    reader = start_reader(hasty, 300)
    os.kill(pid, signal.SIGSTOP)
    hasty.until(lambda: not hasty.is_ready(), 3)
    os.kill(pid, signal.SIGCONT)
    hasty.until(hasty.is_ready, 3)
    reader.join(20)
    assert reader.error is None
    assert reader.finish_reason == "length"
    assert hasty.engine_pid == pid
