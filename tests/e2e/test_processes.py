"""One engine over two processes, as a user starts it: its tokens, its deaths, its end."""

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from tests.e2e.faults import FOREVER, start_reader
from tests.e2e.server import Server, free_port, serving

CONFIG = "configs/tiny_random.py"
FLAGS = (
    "--set=engine.tensor_parallel=2",
    "--set=engine.num_processes=2",
    # Fewer programs to compile, by each of the two, and in less time.
    "--set=engine.mixed_tokens=64",
    "--set=engine.decode_rows=8",
    "--set=platform.xla_flags=--xla_backend_optimization_level=0",
)
REQUESTS = [
    {"prompt": "x" * length, "max_tokens": 24, "ignore_eos": True, "logprobs": 2, **sampling}
    for length, sampling in (
        (3, {"temperature": 0}),
        (200, {"temperature": 0, "presence_penalty": 0.5}),  # in several chunks
        (17, {"temperature": 1.0, "seed": 7}),
        (40, {"temperature": 0.8, "top_p": 0.9, "seed": -1, "logit_bias": {"65": 2.0}}),
    )
]


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A process group; after its tests SIGTERM must finish what runs and end all processes."""
    with serving(CONFIG, tmp_path_factory.mktemp("group") / "log", *FLAGS) as running:
        yield running
        leader, follower = psutil.Process(running.engine_pid), _follower(running)
        reader = start_reader(running, 40)
        running.process.send_signal(signal.SIGTERM)
        assert running.wait(30) == 0
        reader.join(10)
        assert reader.error is None
        assert reader.finish_reason == "length"
        assert not leader.is_running()
        assert not follower.is_running()
        assert "Traceback" not in running.output


def _follower(group: Server) -> psutil.Process:
    (follower,) = psutil.Process(group.engine_pid).children()
    return follower


def _answers(server: Server) -> list[dict]:
    with ThreadPoolExecutor(len(REQUESTS)) as pool:
        replies = list(pool.map(lambda body: server.post("/v1/completions", body), REQUESTS))
    return [reply.json()["choices"][0] for reply in replies]


def test_the_tokens_of_one_process(server: Server, group: Server) -> None:
    for found, expected in zip(_answers(group), _answers(server), strict=True):
        assert found["text"] == expected["text"]
        assert found["finish_reason"] == expected["finish_reason"] == "length"
        assert found["logprobs"]["tokens"] == expected["logprobs"]["tokens"]
        assert found["logprobs"]["token_logprobs"] == pytest.approx(
            expected["logprobs"]["token_logprobs"], abs=1e-4
        )
    assert "over 2 processes" in group.output


@pytest.mark.sweep
def test_killed_follower_takes_the_leader_along_and_both_come_back(group: Server) -> None:
    before = _answers(group)[0]["text"]
    leader, follower = psutil.Process(group.engine_pid), _follower(group)
    reader = start_reader(group, 150)
    follower.kill()
    leader.wait(10)
    group.until(group.is_ready)
    assert _follower(group).pid != follower.pid
    reader.join(60)
    assert reader.error is None
    assert reader.finish_reason == "length"
    assert _answers(group)[0]["text"] == before


@pytest.mark.sweep
def test_with_launchers_of_their_own(tmp_path: Path) -> None:
    """Either launcher's end is the other's, as on several hosts; both can be stopped."""
    drain = ("--set=gateway.drain_s=0.3", "--set=engine.drain_timeout_s=0.2")
    flags = (*FLAGS, *drain, f"--leader_address=127.0.0.1:{free_port()}")
    follower = Server(CONFIG, tmp_path / "follower", *flags, "--role=follower", "--process=1")
    try:
        with serving(CONFIG, tmp_path / "leader", *flags) as leader:
            running = [psutil.Process(server.engine_pid) for server in (leader, follower)]
            reader = start_reader(leader, 600)
            running[0].kill()
            running[1].wait(10)
            leader.until(leader.is_ready)
            reader.join(60)
            assert reader.error is None
            running = [psutil.Process(server.engine_pid) for server in (leader, follower)]
            reader = start_reader(leader, FOREVER)
            follower.process.send_signal(signal.SIGTERM)
            assert follower.wait(30) == 0
            assert "the leader has not ended; this process does after_s=0.5" in follower.output
            assert "killing it" not in follower.output
            running[0].wait(10)
            leader.process.send_signal(signal.SIGTERM)  # while its engine is being started again
            assert leader.wait(30) == 0
            reader.join(10)
            assert reader.error is not None
    finally:
        follower.close()
