"""Clients that ask for much and read nothing: what the gateway holds for them is bounded."""

import json
import socket
import time

import httpx

from tests.gateway.http.http_serving import COMPLETIONS, Served, error_of, serving

MUCH = {"prompt": "x", "n": 64, "logprobs": 20, "max_tokens": 4000, "stream": True}


def ask(served: Served, body: dict[str, object]) -> socket.socket:
    """Sends a request and leaves the answer in the socket."""
    connection = socket.create_connection(("127.0.0.1", served.port), timeout=20)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 << 10)
    data = json.dumps(body).encode()
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return connection


def until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it never held"
        time.sleep(0.01)


def is_idle(served: Served) -> bool:
    stats = served.engine.stats
    return stats.num_running + stats.num_waiting == 0


def rest_of(connection: socket.socket) -> bytes:
    data = b""
    while not data.endswith(b"0\r\n\r\n"):
        more = connection.recv(1 << 20)
        assert more, data[-300:]
        data += more
    return data


def test_a_request_that_is_not_read_ends_and_holds_nothing():
    limit = 1 << 20
    with serving(num_slots=64, max_request_buffer_bytes=limit) as served:
        held: list[int] = []
        with ask(served, MUCH) as unread:
            until(lambda: served.engine.stats.num_running)
            while not is_idle(served):
                held.append(served.do(lambda: served.plane.buffers.used_bytes))
            assert served.do(lambda: served.plane.buffers.used_bytes) == 0
            # Others are served, and the client is told once it reads.
            short = {"prompt": "abc", "max_tokens": 3, "logprobs": 2}
            answer = httpx.post(served.url + COMPLETIONS, json=short).json()
            assert answer["choices"][0]["text"] == "abc"
            text = rest_of(unread)
        assert 0 < max(held) <= limit
        assert b"max_request_buffer_bytes" in text
        assert b'"rate_limit_error"' in text
        assert len(served.engine.aborted) == MUCH["n"]


def test_over_the_budget_of_all_the_largest_ends():
    with serving(num_slots=66, max_buffer_bytes=1 << 20) as served:
        small = MUCH | {"n": 1, "logprobs": None, "max_tokens": 500}
        with ask(served, small) as modest, ask(served, MUCH) as greedy:
            until(lambda: len(served.engine.aborted) == MUCH["n"])
            assert b"gateway.max_buffer_bytes" in rest_of(greedy)
            text = rest_of(modest)
        assert b"gateway.max_buffer_bytes" not in text
        assert text.count(b"data: ") > 1
        assert b'"finish_reason":"length"' in text


def test_a_whole_answer_counts_while_it_is_made():
    with serving(num_slots=64, max_request_buffer_bytes=1 << 20) as served:
        body = MUCH | {"stream": False}
        error = error_of(httpx.post(served.url + COMPLETIONS, json=body, timeout=30), 429)
        assert "max_request_buffer_bytes" in error["message"]
        assert served.do(lambda: served.plane.buffers.used_bytes) == 0


def test_unread_updates_are_merged_as_they_came():
    with serving(num_slots=4) as served:
        body = {"prompt": "abcd", "max_tokens": 600, "logprobs": 3, "n": 2, "seed": 1}
        whole = httpx.post(served.url + COMPLETIONS, json=body, timeout=30).json()
        with ask(served, body | {"stream": True}) as slow:
            until(lambda: is_idle(served))  # all of it is in the gateway now, or on its way
            lines = rest_of(slow).split(b"data: ")
        texts, logprobs = {0: "", 1: ""}, {0: [], 1: []}
        for line in lines[1:]:
            if line.startswith(b"{"):
                (choice,) = json.loads(line.split(b"\n")[0])["choices"]
                texts[choice["index"]] += choice["text"]
                logprobs[choice["index"]] += choice["logprobs"]["top_logprobs"]
        for choice in whole["choices"]:
            assert texts[choice["index"]] == choice["text"]
            assert logprobs[choice["index"]] == choice["logprobs"]["top_logprobs"]
