"""Connections of clients that are silent, slow or too many; nobody else waits for them."""

import contextlib
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import httpx
import pytest

from tests.gateway.http.http_serving import COMPLETIONS, Served, serving

BODY = b'{"prompt": "abc", "max_tokens": 2}'
HEAD = (
    f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    f"Content-Length: {len(BODY)}\r\n\r\n"
).encode()
SHORT_S = 0.2


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(head_timeout_s=SHORT_S, body_timeout_s=SHORT_S, step_s=0.02) as running:
        yield running


def connect(served: Served, **options: int) -> socket.socket:
    raw = socket.socket()
    for name, value in options.items():
        raw.setsockopt(socket.SOL_SOCKET, getattr(socket, name), value)
    raw.settimeout(10)
    raw.connect(("127.0.0.1", served.port))
    return raw


def read_all(raw: socket.socket) -> bytes:
    """What comes until the server closes the connection."""
    parts: list[bytes] = []
    with raw, contextlib.suppress(ConnectionResetError):
        while part := raw.recv(65536):
            parts.append(part)
    return b"".join(parts)


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"", b""),
        (b"\r\n\r\n", b""),
        (b"GET /health HT", b"408"),
        (b"GET /health HTTP/1.1\r\nHost: x\r\n", b"408"),
        (HEAD, b"408"),
        (HEAD + BODY[:-1], b"408"),
        (HEAD.replace(b"Content-Length: 34", b"Transfer-Encoding: chunked") + b"5\r\n", b"408"),
    ],
)
def test_a_request_that_does_not_come_is_given_up(served: Served, sent: bytes, status: bytes):
    before = served.metrics.connections.timed_out
    raw = connect(served)
    start_s = time.monotonic()
    raw.sendall(sent)
    answer = read_all(raw)
    assert time.monotonic() - start_s >= SHORT_S
    assert answer[9:12] == status
    if status:
        assert b'"code":"timeout"' in answer
        assert b"connection: close" in answer
    assert served.metrics.connections.timed_out == before + 1


@pytest.mark.parametrize(
    "dribbled", [HEAD + BODY, b"\r\n" * 100, HEAD.replace(b": 34", b": 9999") + b" " * 100]
)
def test_a_byte_now_and_then_buys_no_time(served: Served, dribbled: bytes):
    raw = connect(served)
    start_s = time.monotonic()
    with contextlib.suppress(OSError):
        for byte in dribbled:
            raw.sendall(bytes([byte]))
            time.sleep(0.02)
    assert time.monotonic() - start_s < 2 + 0.02 * 10
    assert read_all(raw)[9:12] in (b"", b"408")


def test_time_for_a_body_grows_with_its_bytes(served: Served):
    """64 KiB more are worth four seconds, and a body in time is answered."""
    body = BODY[:-1] + b" " * (64 << 10) + b"}"
    head = HEAD.replace(b": 34", b": %d" % len(body))
    raw = connect(served)
    raw.sendall(head + body[:-1])
    time.sleep(SHORT_S * 3)
    raw.sendall(body[-1:])
    assert raw.recv(12) == b"HTTP/1.1 200"
    raw.close()


def test_no_limit_ends_what_the_server_works_on_or_an_idle_connection(served: Served):
    with httpx.Client(base_url=served.url) as http:
        request = {"prompt": "abc", "max_tokens": 35, "stream": True}
        start_s = time.monotonic()
        assert http.post(COMPLETIONS, json=request).text.endswith("data: [DONE]\n\n")
        assert time.monotonic() - start_s > SHORT_S * 3
        raw = connect(served)
        raw.sendall(HEAD + BODY)
        assert raw.recv(12) == b"HTTP/1.1 200"
        time.sleep(SHORT_S * 3)  # kept alive for the next one
        raw.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert b"alive" in read_all(raw)


def test_half_a_request_behind_a_running_one_does_not_end_that_one(served: Served):
    body = b'{"prompt": "abc", "max_tokens": 35}'
    raw = connect(served)
    raw.sendall(HEAD.replace(b": 34", b": 35") + body + b"GET /hea")
    answer = read_all(raw)
    assert answer.startswith(b"HTTP/1.1 200")
    assert b'"completion_tokens":35' in answer


# An answer of 10 MB, more than the system's buffers hold.
LONG = b'{"prompt": [%s], "n": 100, "echo": true, "max_tokens": 1}' % b",".join(
    [b'"%s"' % (b"x" * 3000)] * 34
)
LONG_HEAD = HEAD.replace(b": 34", b": %d" % len(LONG))


def test_a_client_that_reads_nothing_is_left():
    with (
        serving(write_timeout_s=SHORT_S, max_queue=4096) as served,
        connect(served, SO_RCVBUF=4096) as raw,
    ):
        raw.sendall(LONG_HEAD + LONG)
        end_s = time.monotonic() + 10
        counts = served.metrics.connections
        while (counts.open or not counts.timed_out) and time.monotonic() < end_s:
            time.sleep(0.02)
        assert (counts.open, counts.timed_out) == (0, 1)


def test_a_client_that_reads_slowly_is_kept():
    """It takes some of its answer every now and then, which the time-out allows."""
    with (
        serving(write_timeout_s=1.0, max_queue=4096) as served,
        connect(served, SO_RCVBUF=1 << 16) as raw,
    ):
        raw.sendall(LONG_HEAD + LONG)
        head = raw.recv(1000)
        size = int(re.search(rb"content-length: (\d+)", head)[1])
        left = size - len(head.partition(b"\r\n\r\n")[2])
        assert size > 5_000_000
        start_s = time.monotonic()
        while left:
            part = raw.recv(200_000 if time.monotonic() - start_s < 1.5 else 1 << 22)
            assert part, f"{left} of {size} bytes are missing"
            left -= len(part)
            time.sleep(0.05 if time.monotonic() - start_s < 1.5 else 0)
        assert served.metrics.connections.timed_out == 0


def test_above_the_limit_probes_alone_are_answered(caplog: pytest.LogCaptureFixture):
    with serving(max_connections=4) as served, contextlib.ExitStack() as stack:
        silent = [stack.enter_context(connect(served)) for _ in range(4)]
        for path, status in (("/health", 200), ("/ready", 200), ("/v1/models", 503), ("/x", 503)):
            response = httpx.get(served.url + path)
            assert response.status_code == status
            assert response.headers["connection"] == "close"
            if status == 503:
                assert response.headers["retry-after"] == "1"
                assert "connections" in response.json()["error"]["message"]
        assert served.metrics.connections.refused == 2
        said = [record.getMessage() for record in caplog.records if "refused" in record.msg]
        assert len(said) == 1  # not a line for each
        assert "open: 4, gateway.max_connections" in said[0]
        # More silent ones than the reserve holds: the oldest make room for the probe.
        extra = [stack.enter_context(connect(served)) for _ in range(60)]
        for path in ("/health", "/ready"):
            assert httpx.get(served.url + path).status_code == 200
        assert extra[0].recv(1) == b""
        counts, end_s = served.metrics.connections, time.monotonic() + 10
        before = counts.open
        for each in silent[:2]:
            each.close()
        while counts.open > before - 2 and time.monotonic() < end_s:
            time.sleep(0.01)
        # One that came above the limit is served once there is room.
        extra[-1].sendall(b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n")
        assert extra[-1].recv(12) == b"HTTP/1.1 200"
        metrics = httpx.get(served.url + "/metrics").text
        assert "jserve_http_connections_refused_total" in metrics
        assert "jserve_http_connections{" in metrics


# A server in a process that may open 256 files; it says its port and ends when its input does.
FEW_FILES = """
import asyncio, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
import logging, uvloop
logging.basicConfig(level="INFO", format="%(message)s")
from starlette.responses import PlainTextResponse
from jserve.gateway.http.server import HttpServer

async def main():
    server = HttpServer(PlainTextResponse("alive"), host="127.0.0.1", port=0, drain_s=1.0)
    await server.start()
    print(server.port, flush=True)
    await asyncio.to_thread(sys.stdin.read)

uvloop.run(main())
"""


def test_a_probe_is_answered_where_descriptors_run_out():
    process = subprocess.Popen(
        [sys.executable, "-c", FEW_FILES],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process, contextlib.ExitStack() as stack:
        port = int(process.stdout.readline())
        for _ in range(400):
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=5))
        for path, status in (("/health", 200), ("/ready", 200), ("/v1/models", 503)):
            assert httpx.get(f"http://127.0.0.1:{port}{path}").status_code == status
        process.stdin.close()
        log = process.stderr.read()
    assert "connections refused: 1; open: 88, all that the limit of open files" in log
    assert "Traceback" not in log
