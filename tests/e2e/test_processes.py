"""One engine over two processes, as a user starts it: its tokens, its deaths, its end."""

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from tests.e2e.faults import FOREVER, start_reader
from tests.e2e.server import Server, serving

CONFIG = "configs/tiny_random.py"
FLAGS = (
    "--set=engine.tensor_parallel=2",
    "--set=engine.num_processes=2",
    # Fewer programs to compile, by each of the two, and in less time.
    "--set=engine.mixed_tokens=64",
    "--set=engine.window_rows=8",
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
def replica(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(CONFIG, tmp_path_factory.mktemp("replica") / "log", *FLAGS) as running:
        yield running


def _follower(replica: Server) -> psutil.Process:
    (follower,) = psutil.Process(replica.engine_pid).children()
    return follower


def _answers(server: Server) -> list[dict]:
    with ThreadPoolExecutor(len(REQUESTS)) as pool:
        replies = list(pool.map(lambda body: server.post("/v1/completions", body), REQUESTS))
    return [reply.json()["choices"][0] for reply in replies]


def test_the_tokens_of_one_process(server: Server, replica: Server) -> None:
    for found, expected in zip(_answers(replica), _answers(server), strict=True):
        assert found["text"] == expected["text"]
        assert found["finish_reason"] == expected["finish_reason"] == "length"
        assert found["logprobs"]["tokens"] == expected["logprobs"]["tokens"]
        assert found["logprobs"]["token_logprobs"] == pytest.approx(
            expected["logprobs"]["token_logprobs"], abs=1e-4
        )
    assert "over 2 processes" in replica.output


def _check_all_end_and_come_back(
    replica: Server, killed: psutil.Process, others: list[psutil.Process]
) -> None:
    reader = start_reader(replica, FOREVER)
    killed.kill()
    reader.join(10)
    assert reader.error is not None
    psutil.wait_procs([killed, *others], timeout=10)
    assert not any(process.is_running() for process in others)
    replica.until(replica.is_ready)
    assert _follower(replica).pid not in {process.pid for process in (killed, *others)}
    answer = replica.post("/v1/completions", REQUESTS[0])
    assert answer.status_code == 200


def test_killed_follower_takes_all_down_and_all_come_back(replica: Server) -> None:
    before = _answers(replica)[0]["text"]
    leader, follower = psutil.Process(replica.engine_pid), _follower(replica)
    _check_all_end_and_come_back(replica, follower, [leader])
    assert _answers(replica)[0]["text"] == before


def test_killed_leader_takes_the_follower_along(replica: Server) -> None:
    leader, follower = psutil.Process(replica.engine_pid), _follower(replica)
    _check_all_end_and_come_back(replica, leader, [follower])


def test_sigterm_finishes_what_runs_and_ends_all(replica: Server) -> None:
    """The last test: it ends the server."""
    leader, follower = psutil.Process(replica.engine_pid), _follower(replica)
    reader = start_reader(replica, 200)
    replica.process.send_signal(signal.SIGTERM)
    assert replica.wait(30) == 0
    reader.join(10)
    assert reader.error is None
    assert reader.finish_reason == "length"
    assert not leader.is_running()
    assert not follower.is_running()
    assert "Traceback" not in replica.output
