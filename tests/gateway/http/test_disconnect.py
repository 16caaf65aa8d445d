"""A client that leaves, at any point in any way, frees what it held; a slow one harms nobody."""

import json
import socket
import struct
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from jserve.core.request import Request
from tests.gateway.http.http_serving import COMPLETIONS, Served, serving

LONG = {"prompt": "a", "max_tokens": 4000}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(step_s=0.005, num_slots=2) as served:
        yield served


def wire(body: dict[str, Any], path: str = COMPLETIONS) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    return head.encode() + b"content-length: %d\r\n\r\n" % len(data) + data


def connect(served: Served) -> socket.socket:
    raw = socket.create_connection(("127.0.0.1", served.port))
    raw.settimeout(10)
    return raw


def leave(raw: socket.socket, *, reset: bool) -> None:
    if reset:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    raw.close()


def wait_for_running(served: Served, count: int) -> None:
    end_s = time.monotonic() + 5
    while served.engine.stats.num_running < count and time.monotonic() < end_s:
        time.sleep(0.002)
    assert served.engine.stats.num_running >= count


def assert_freed(served: Served) -> None:
    """Asserts it long before the generation would have ended by itself (20 s)."""
    served.assert_idle(timeout_s=5.0)


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("sent", [1, 60, 110, 120])
def test_while_it_sends(served: Served, sent: int, reset: bool) -> None:
    raw = connect(served)
    raw.sendall(wire(LONG)[:sent])
    time.sleep(0.02)
    leave(raw, reset=reset)
    assert_freed(served)


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("read", [0, 1, 200, 330, 450, 1000, 2000])
def test_anywhere_in_a_stream(served: Served, read: int, reset: bool) -> None:
    raw = connect(served)
    raw.sendall(wire(LONG | {"stream": True}))
    while read:
        read -= len(raw.recv(read))
    leave(raw, reset=reset)
    assert_freed(served)


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("body", [LONG, LONG | {"n": 2}, LONG | {"prompt": ["a", "b"]}])
@pytest.mark.parametrize("stream", [False, True])
def test_while_it_waits(served: Served, body: dict[str, Any], stream: bool, reset: bool) -> None:
    raw = connect(served)
    raw.sendall(wire(body | {"stream": stream}))
    wait_for_running(served, 1)
    leave(raw, reset=reset)
    assert_freed(served)


def test_in_the_queue(served: Served) -> None:
    others = [connect(served) for _ in range(2)]
    for other in others:
        other.sendall(wire(LONG))
    wait_for_running(served, 2)
    queued = connect(served)
    queued.sendall(wire(LONG))
    while not served.engine.stats.num_waiting:
        time.sleep(0.002)
    queued.close()
    while served.engine.stats.num_waiting:
        time.sleep(0.002)
    assert served.engine.stats.num_running == 2
    for other in others:
        other.close()
    assert_freed(served)


def test_half_closed_connections_count_as_left(served: Served) -> None:
    with connect(served) as raw:
        raw.sendall(wire(LONG))
        wait_for_running(served, 1)
        raw.shutdown(socket.SHUT_WR)
        assert_freed(served)


def test_with_a_second_request_in_the_pipe(served: Served) -> None:
    raw = connect(served)
    raw.sendall(wire(LONG | {"stream": True}))
    wait_for_running(served, 1)
    raw.sendall(wire(LONG))
    time.sleep(0.05)
    raw.close()
    assert_freed(served)


def test_pipelined_requests_are_answered_in_order(served: Served) -> None:
    with connect(served) as raw:
        raw.sendall(wire({"prompt": "a", "max_tokens": 3}) + wire({"prompt": "b", "max_tokens": 3}))
        received = b""
        while received.count(b'"usage"') < 2:
            received += raw.recv(4096)
        # With quotes: three equal hexadecimal digits also occur in ids.
        assert 0 < received.index(b'"aaa"') < received.index(b'"bbb"')


def test_a_client_library_that_stops_reading(served: Served) -> None:
    with httpx.stream("POST", served.url + COMPLETIONS, json=LONG | {"stream": True}) as response:
        for _ in zip(range(3), response.iter_lines(), strict=False):
            pass
    assert_freed(served)


def test_keep_alive_comments_while_the_prompt_is_read() -> None:
    with serving(step_s=0.5, sse_keep_alive_s=0.1) as served:
        body = {"prompt": "a", "max_tokens": 1, "stream": True}
        text = httpx.post(served.url + COMPLETIONS, json=body).text
        comments, rest = text.rsplit(": keep-alive\n\n", 1)
        assert comments.replace(": keep-alive\n\n", "") == ""
        assert 1 <= comments.count(":") <= 5
        assert rest.startswith("data: {")
        with openai.OpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=0) as client:
            chunks = client.completions.create(model="", prompt="a", max_tokens=1, stream=True)
            assert [chunk.choices[0].text for chunk in chunks] == ["a"]


def test_a_reader_that_stops_bounds_what_is_buffered() -> None:
    """The engine runs on; its tokens gather in one merged update, not in the socket's queue."""

    def reply(request: Request) -> list[int]:
        return [97] * request.sampling.max_tokens

    with serving(reply=reply) as served:
        raw = socket.socket()
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.settimeout(10)
        raw.connect(("127.0.0.1", served.port))
        # Chunks with 20 alternatives are large: all of them would be over 12 MB.
        raw.sendall(wire(LONG | {"logprobs": 20, "n": 2, "stream": True}))
        start_s = time.monotonic()
        while served.engine.stats.num_running or not served.engine.stats.output_tokens:
            time.sleep(0.01)
            assert time.monotonic() - start_s < 20
        # Others were served meanwhile, and are now.
        fast = httpx.post(served.url + COMPLETIONS, json={"prompt": "b", "max_tokens": 3})
        assert fast.json()["choices"][0]["text"] == "aaa"

        def buffered() -> int:
            connections = served.server._server.server_state.connections
            return max(it.transport.get_write_buffer_size() for it in connections)

        assert served.do(buffered) < 1 << 20
        # It reads on, and has lost nothing.
        received = b""
        while not received.endswith(b"0\r\n\r\n"):
            received += raw.recv(1 << 20)
        raw.close()
    tokens = [0, 0]
    chunks = received.partition(b"\r\n\r\n")[2].split(b"\r\n")[1::2]  # chunks of the body
    for event in b"".join(chunks).split(b"\n\n")[:-2]:
        choice = json.loads(event.removeprefix(b"data: "))["choices"][0]
        tokens[choice["index"]] += len(choice["logprobs"]["tokens"])
    assert tokens == [4000, 4000]


@pytest.mark.parametrize("path", [COMPLETIONS, "/v1/chat/completions"])
def test_a_large_answer_is_whole(path: str) -> None:
    with serving() as quick:
        chat = "chat" in path
        body = {"messages": [{"role": "user", "content": "ab"}]} if chat else {"prompt": "ab"}
        wanted = {"logprobs": True, "top_logprobs": 20} if chat else {"logprobs": 20}
        answer = httpx.post(quick.url + path, json=body | wanted | {"max_tokens": 1000}).json()
        logprobs = answer["choices"][0]["logprobs"]
        assert len(logprobs["content" if chat else "tokens"]) == 1000
        assert answer["usage"]["completion_tokens"] == 1000
