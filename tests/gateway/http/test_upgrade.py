"""Offers to upgrade a connection: the request is answered as if they were not made."""

import contextlib
import json
import socket
import time
from collections.abc import Iterator

import h11
import pytest

from tests.gateway.http.http_serving import COMPLETIONS, Served, serving

BODY = json.dumps({"prompt": "ab", "max_tokens": 4}).encode()
# The first is what the JDK's HttpClient sends with every request over plain HTTP.
OFFERS = {
    "h2c": (
        b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
        b"HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA\r\n"
    ),
    "websocket": (
        b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
        b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    ),
    "tls": b"Connection: keep-alive, upgrade\r\nUpgrade: TLS/1.2\r\n",
    "two": b"Connection: Upgrade\r\nConnection: keep-alive\r\nUpgrade: h2c, IRC/6.9\r\n",
}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as served:
        yield served


def post(offer: bytes, framing: bytes, body: bytes) -> tuple[bytes, bytes]:
    head = b"POST %b HTTP/1.1\r\nHost: x\r\n%b" % (COMPLETIONS.encode(), offer)
    return head + b"Content-Type: application/json\r\n%b\r\n\r\n" % framing, body


def length(body: bytes) -> bytes:
    return b"Content-Length: %d" % len(body)


def exchange(served: Served, *pieces: bytes, methods: str = "POST") -> list[tuple[int, bytes]]:
    """Sends the pieces, one packet each, and reads one answer per method by h11."""
    answers: list[tuple[int, bytes]] = []
    with socket.create_connection(("127.0.0.1", served.port)) as raw:
        raw.settimeout(5)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in pieces:
            raw.sendall(piece)
            time.sleep(0.01)
        received = b""
        for method in methods.split():
            client = h11.Connection(h11.CLIENT)
            client.send(h11.Request(method=method, target="/", headers=[("host", "x")]))
            client.send(h11.EndOfMessage())
            status, body = 0, b""
            if received:
                client.receive_data(received)
            while not isinstance(event := client.next_event(), h11.EndOfMessage):
                if event is h11.NEED_DATA:
                    client.receive_data(raw.recv(65536))
                elif isinstance(event, h11.Response):
                    status = event.status_code
                elif isinstance(event, h11.Data):
                    body += bytes(event.data)
            received = client.trailing_data[0]
            answers.append((status, body))
        assert received == b"", "an answer to nothing that was asked"
        raw.settimeout(0.02)
        with contextlib.suppress(TimeoutError):
            assert raw.recv(1000) == b""
    return answers


def text(answer: tuple[int, bytes]) -> str:
    assert answer[0] == 200, answer
    return json.loads(answer[1])["choices"][0]["text"]


@pytest.mark.parametrize("offer", OFFERS)
@pytest.mark.parametrize("apart", [False, True])
def test_the_body_is_the_requests(served: Served, offer: str, apart: bool) -> None:
    head, body = post(OFFERS[offer], length(BODY), BODY)
    pieces = [head, body] if apart else [head + body]
    assert text(exchange(served, *pieces)[0]) == "abab"
    chunks = b"%x\r\n%b\r\n2\r\n  \r\n0\r\n\r\n" % (len(BODY), BODY)
    head, body = post(OFFERS[offer], b"Transfer-Encoding: chunked", chunks)
    pieces = [head, body] if apart else [head + body]
    assert text(exchange(served, *pieces)[0]) == "abab"


@pytest.mark.parametrize("offer", OFFERS)
def test_a_body_is_never_a_request(served: Served, offer: str) -> None:
    inner = b"GET /version HTTP/1.1\r\nHost: x\r\n\r\n"
    head, body = post(OFFERS[offer], length(inner), inner)
    for pieces in ([head, body], [head + body], [head[:40], head[40:] + body[:9], body[9:]]):
        (status, answer), after = exchange(
            served, *pieces, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n", methods="POST GET"
        )
        assert status == 400
        assert b"JSON" in answer
        assert after == (200, b'{"status":"alive"}')


@pytest.mark.parametrize("offer", OFFERS)
def test_the_connection_serves_on(served: Served, offer: str) -> None:
    """Requests with and without an offer, in one packet."""
    get = b"GET /health HTTP/1.1\r\nHost: x\r\n%b\r\n"
    asked = get % OFFERS[offer]
    many = asked + (get % b"") + asked + b"".join(post(OFFERS[offer], length(BODY), BODY)) + asked
    answers = exchange(served, many, methods="GET GET GET POST GET")
    assert [status for status, _ in answers] == [200] * 5
    assert text(answers[3]) == "abab"


@pytest.mark.parametrize("offer", OFFERS)
@pytest.mark.parametrize("cut", [1, 30, 60, -3, -1])
def test_a_head_in_two_packets(served: Served, offer: str, cut: int) -> None:
    head, body = post(OFFERS[offer], length(BODY), BODY)
    assert text(exchange(served, head[:cut], head[cut:] + body)[0]) == "abab"


def test_what_else_the_head_says_still_counts(served: Served) -> None:
    offer = OFFERS["h2c"]
    head, body = post(offer + b"Expect: 100-continue\r\n", length(BODY), BODY)
    assert text(exchange(served, head, body)[0]) == "abab"
    # Two framings of one body are refused, as without an offer.
    both = length(BODY) + b"\r\nTransfer-Encoding: chunked"
    head, body = post(offer, both, BODY)
    assert exchange(served, head + body)[0][0] == 400
    # "close" among the options closes.
    with socket.create_connection(("127.0.0.1", served.port)) as raw:
        raw.settimeout(5)
        raw.sendall(
            b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, close\r\nUpgrade: h2c\r\n\r\n"
        )
        answer = b""
        while data := raw.recv(65536):
            answer += data
        assert answer.startswith(b"HTTP/1.1 200")
        assert b"connection: close" in answer.lower()


def test_no_tunnel_is_opened(served: Served) -> None:
    with socket.create_connection(("127.0.0.1", served.port)) as raw:
        raw.settimeout(5)
        raw.sendall(b"CONNECT x:80 HTTP/1.1\r\nHost: x\r\n\r\nGET /version HTTP/1.1\r\n\r\n")
        answer = b""
        while data := raw.recv(65536):
            answer += data
        assert answer.startswith(b"HTTP/1.1 400")
        assert answer.count(b"HTTP/1.1") == 1
