"""Crashes and stops of real processes: clients learn at once, nothing is left behind."""

import signal
import socket
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import httpx
import psutil

from jserve.proto import inference_pb2, inference_pb2_grpc, types_pb2
from tests.e2e.faults import FOREVER, engine_sockets, start_reader
from tests.e2e.server import Server, serving

CONFIG = "configs/tiny_random.py"


def _tcp_ports(pid: int) -> set[int]:
    """Ports on which a process listens, or through which it talks."""
    return {found.laddr.port for found in psutil.Process(pid).net_connections("tcp")}


def test_engine_is_reached_by_nobody_else(server: Server) -> None:
    assert _tcp_ports(server.engine_pid) == set()
    (path,) = engine_sockets(server.engine_pid)
    folder = Path(path).parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    listening = {
        found.laddr.port
        for found in psutil.Process(server.process.pid).net_connections("tcp")
        if found.status == psutil.CONN_LISTEN
    }
    assert listening == {server.http_port, server.grpc_port}


def test_sigterm_finishes_what_runs_and_exits_with_0(tmp_path: Path) -> None:
    with serving(CONFIG, tmp_path / "log") as server:
        reader = start_reader(server)
        engine = psutil.Process(server.engine_pid)
        server.process.send_signal(signal.SIGTERM)
        assert server.wait() == 0
        reader.join(10)
        assert reader.error is None
        assert reader.finish_reason == "length"
        assert not engine.is_running()


def test_second_signal_stops_at_once_and_tells_who_waits(tmp_path: Path) -> None:
    with (
        serving(CONFIG, tmp_path / "log") as server,
        socket.create_connection(("127.0.0.1", server.http_port)) as half_sent,
        httpx.Client(base_url=server.url, timeout=60) as client,
        ThreadPoolExecutor(24) as pool,
    ):
        reader = start_reader(server, FOREVER)
        body = {"prompt": "x", "max_tokens": FOREVER, "ignore_eos": True}
        # More than there are slots: some run, some wait. And one that is never sent whole.
        posts = [pool.submit(client.post, "/v1/completions", json=body) for _ in range(12)]
        calls = [pool.submit(_grpc_status, server) for _ in range(4)]
        half_sent.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
        )
        server.until(lambda: server.gauge("jserve_requests_in_flight") == 17)
        engine = psutil.Process(server.engine_pid)
        server.process.send_signal(signal.SIGINT)
        server.until(lambda: "draining" in server.output)
        start_s = time.monotonic()
        server.process.send_signal(signal.SIGINT)
        assert server.wait(10) == 130
        assert time.monotonic() - start_s < 5
        assert not engine.is_running()
        for post in posts:
            assert post.result().status_code == 503
            assert post.result().json()["error"]["type"] == "service_unavailable_error"
            assert int(post.result().headers["retry-after"]) > 0
        reader.join(10)
        assert reader.error["type"] == "service_unavailable_error"
        assert {call.result() for call in calls} == {grpc.StatusCode.UNAVAILABLE}
        half_sent.settimeout(10)
        assert half_sent.recv(4096).startswith(b"HTTP/1.1 503 ")
        assert "Traceback" not in server.output


def _grpc_status(server: Server) -> grpc.StatusCode:
    """How a long generation over gRPC ends."""
    asked = inference_pb2.GenerateRequest(
        text="x", sampling=types_pb2.SamplingParams(max_tokens=FOREVER, ignore_eos=True)
    )
    with grpc.insecure_channel(server.grpc_address) as channel:
        call = inference_pb2_grpc.InferenceStub(channel).Generate(asked, timeout=60)
        try:
            for _ in call:
                pass
        except grpc.RpcError:
            pass
        return call.code()


def test_killed_launcher_takes_the_engine_along(tmp_path: Path) -> None:
    with serving(CONFIG, tmp_path / "log") as server:
        engine = psutil.Process(server.engine_pid)
        server.process.kill()
        server.wait()
        engine.wait(10)


def test_taken_port_is_said_before_anything_is_loaded(server: Server, tmp_path: Path) -> None:
    second = Server(CONFIG, tmp_path / "log", f"--http_port={server.http_port}")
    assert second.wait(30) == 2
    assert "--http_port" in second.output


def test_wrong_config_ends_before_anything_is_served(tmp_path: Path) -> None:
    wrong = Server(CONFIG, tmp_path / "log", "--set", "model.source=/no/such/model.gguf")
    assert wrong.wait(60) == 2
    assert "there is no file or folder /no/such/model.gguf" in wrong.output
