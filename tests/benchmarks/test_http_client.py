"""The client against bytes as servers really send them: cut anywhere, or broken off."""

import asyncio

import pytest

from benchmarks.serving.failures import BenchmarkError, RequestFailed
from benchmarks.serving.http_client import CannotConnect, HttpClient, HttpFailure, NotEventStream
from benchmarks.serving.sse import EventParser
from tests.benchmarks.scripted_server import END, SSE_HEAD, chunked, plain, serving, sse

PAYLOAD = (
    b": hello\r\n\r\nevent: x\ndata: one\n\ndata:two\r\n\r\ndata: th\ndata: ree\n\ndata: [DONE]\n\n"
)
EVENTS = [b"one", b"two", b"th\nree", b"[DONE]"]


def test_events_cut_anywhere():
    for cut in range(len(PAYLOAD) + 1):
        parser = EventParser()
        assert parser.feed(PAYLOAD[:cut]) + parser.feed(PAYLOAD[cut:]) == EVENTS


def test_events_byte_by_byte():
    parser = EventParser()
    assert [event for byte in PAYLOAD for event in parser.feed(bytes([byte]))] == EVENTS


def streamed(answer, times=1):
    """Returns the events of a POST, sent `times` times over one client, and the server."""

    async def main():
        async with serving(answer) as server:
            client = HttpClient(server.url, api_key="secret")
            try:
                found = []
                for _ in range(times):
                    events = []
                    request = client.encode("/v1/completions", b'{"a": 1}')
                    await client.stream(request, lambda data, now_s: events.append((data, now_s)))  # noqa: B023
                    found.append(events)
                return found, server
            finally:
                client.close()

    return asyncio.run(main())


@pytest.mark.parametrize("cut", [None, 1, 2, 3, 50])
def test_a_stream_cut_anywhere(cut):
    (events,), server = streamed(lambda request: chunked(PAYLOAD, cut))
    assert [data for data, _ in events] == EVENTS
    times = [now_s for _, now_s in events]
    assert times == sorted(times)
    (request,) = server.requests
    assert (request.method, request.path, request.body) == ("POST", "/v1/completions", {"a": 1})
    assert request.headers["authorization"] == "bearer secret"
    assert request.headers["host"] == server.url.removeprefix("http://")


def test_a_connection_is_used_again():
    found, server = streamed(lambda request: chunked(PAYLOAD), times=3)
    assert len(found) == 3
    assert server.num_connections == 1


def test_a_stream_may_end_with_its_connection():
    found, server = streamed(lambda request: [SSE_HEAD + b"\r\n", PAYLOAD, END], times=2)
    assert [[data for data, _ in events] for events in found] == [EVENTS, EVENTS]
    assert server.num_connections == 2


def test_a_kept_connection_that_died_is_replaced():
    answers = iter([[*chunked(PAYLOAD), END], chunked(PAYLOAD)])
    found, server = streamed(lambda request: next(answers), times=2)
    assert len(found[1]) == len(EVENTS)
    assert server.num_connections == 2


@pytest.mark.parametrize(
    ("script", "kind", "message"),
    [
        (
            plain(b'{"error": {"message": "no such\\nmodel"}}', 404),
            HttpFailure,
            "HTTP 404: no such model",
        ),
        (plain(b'{"error": "busy"}', 503), HttpFailure, "HTTP 503: busy"),
        (plain(b'{"detail": "bad"}', 422), HttpFailure, "HTTP 422: bad"),
        (plain(b"", 500), HttpFailure, "HTTP 500: no explanation"),
        (plain(b"<html>", 200, "text/html"), NotEventStream, "the answer is text/html, not"),
        (
            [SSE_HEAD + b"transfer-encoding: chunked\r\n\r\n5\r\nda", END],
            RequestFailed,
            "in the middle",
        ),
        ([b"HTTP/1.1 200 OK\r\ncont", END], RequestFailed, "in the middle"),
        ([END], RequestFailed, "without an answer"),
        ([b"SSH-2.0-OpenSSH\r\n", END], RequestFailed, "not an HTTP answer"),
    ],
)
def test_failures(script, kind, message):
    with pytest.raises(kind) as caught:
        streamed(lambda request: script)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_error_of_the_reader_comes_out():
    async def main():
        def refuse(data, now_s):
            raise RequestFailed("not what I wanted")

        async with serving(lambda request: chunked(sse("x"))) as server:
            client = HttpClient(server.url)
            with pytest.raises(RequestFailed, match="not what I wanted"):
                await client.stream(client.encode("/", b"{}"), refuse)

    asyncio.run(main())


def test_nobody_listens():
    async def main():
        async with serving(lambda request: []) as server:
            url = server.url
        with pytest.raises(
            CannotConnect, match=r"cannot connect to 127.0.0.1:\d+ \(Connection refused\)"
        ):
            await HttpClient(url).get("/v1/models")

    asyncio.run(main())


@pytest.mark.parametrize("url", ["ftp://x", "http://", "http://host:99999", ""])
def test_what_is_no_url(url):
    with pytest.raises(BenchmarkError, match="--url"):
        HttpClient(url)


def test_a_cancelled_stream_closes_its_connection():
    async def main():
        async with serving(lambda request: [SSE_HEAD + b"\r\n", *[sse("x")] * 1000]) as server:
            client = HttpClient(server.url)
            request = client.encode("/", b"{}")
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.02):
                    await client.stream(request, lambda data, now_s: None)
            assert not client._idle

    asyncio.run(main())
