"""Bodies above 64 kB: read in another process, with the answers of small ones."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from starlette.requests import Request
from starlette.types import Message

from jserve.core.errors import Overloaded
from jserve.gateway.config import UnknownFields
from jserve.gateway.tenants import Caller
from tests.gateway.http.http_serving import CHAT, COMPLETIONS, END, Served, error_of, serving

PADDING = " " * (70 << 10)  # white space between tokens of JSON means nothing


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as served:
        yield served


def post(served: Served, path: str, body: bytes) -> httpx.Response:
    headers = {"content-type": "application/json"}
    return httpx.post(served.url + path, content=body, headers=headers, timeout=30)


def without_ids(answer: dict) -> dict:
    return {key: value for key, value in answer.items() if key not in ("id", "created")}


MESSAGES = [{"role": "user", "content": [{"type": "text", "text": "hé"}]}]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, {"prompt": "hé", "max_tokens": 4, "seed": 1, "stop": ["zz"]}),
        (COMPLETIONS, {"prompt": ["a", "b"], "max_tokens": 2, "n": 2}),
        (COMPLETIONS, {"prompt": [[1, 2], [3]], "max_tokens": 2, "echo": True, "logprobs": 2}),
        (COMPLETIONS, {"prompt": [5, 6], "max_tokens": 2, "allowed_token_ids": [5, 6, 6]}),
        (COMPLETIONS, {"prompt": "x", "max_tokens": 2, "logit_bias": {"5": 1.5}, "top_k": -1}),
        (COMPLETIONS, {"prompt": "x", "max_tokens": 5, "min_tokens": 3, "bad_token_ids": [7]}),
        (CHAT, {"messages": MESSAGES, "max_tokens": 3, "top_logprobs": 1, "logprobs": True}),
        ("/tokenize", {"prompt": "hé", "return_token_strs": True}),
        ("/tokenize", {"messages": MESSAGES}),
        ("/detokenize", {"tokens": [104, 195, 169, END]}),
        # Refused:
        (COMPLETIONS, {"prompt": []}),
        (COMPLETIONS, {"prompt": [[1], "a"]}),
        (COMPLETIONS, {"prompt": [[1, 2], [True]]}),
        (COMPLETIONS, {"prompt": [1, END + 1]}),
        (COMPLETIONS, {"prompt": [[]]}),
        (COMPLETIONS, {"prompt": [1] * 5000}),
        (COMPLETIONS, {"prompt": ["x"] * 257}),
        (COMPLETIONS, {"prompt": "x", "max_tokens": 9999}),
        (COMPLETIONS, {"prompt": "x", "max_tokens": 2, "min_tokens": 3}),
        (COMPLETIONS, {"prompt": "x", "max_tokens": "2"}),
        (COMPLETIONS, {"prompt": "x", "temperature": [[]]}),
        (COMPLETIONS, {"prompt": "x", "logit_bias": {str(i): 1 for i in range(301)}}),
        (COMPLETIONS, {"prompt": "x", "allowed_token_ids": []}),
        (COMPLETIONS, {"prompt": "x", "allowed_token_ids": [5], "bad_token_ids": [5]}),
        (COMPLETIONS, {"prompt": "x", "allowed_token_ids": [5] * 300}),
        (COMPLETIONS, {"prompt": "x", "stop": ["y"] * 17}),
        (COMPLETIONS, {"prompt": "x", "nonsense": 1}),
        (COMPLETIONS, {"prompt": "x", "model": "another"}),
        (CHAT, {"messages": MESSAGES * 5000}),
        (CHAT, {"messages": [{"role": "user", "content": 1}]}),
        (CHAT, {"messages": [{"role": "user", "content": "boom"}]}),
        ("/tokenize", {"prompt": "x", "messages": MESSAGES}),
        ("/detokenize", {"tokens": [END + 1]}),
        ("/detokenize", {"tokens": "x"}),
    ],
)
def test_a_large_body_gets_the_answer_of_a_small_one(served: Served, path, body):
    text = json.dumps(body)
    small = post(served, path, text.encode())
    large = post(served, path, (text[:-1] + PADDING + "}").encode())
    assert large.status_code == small.status_code
    assert without_ids(large.json()) == without_ids(small.json())


@pytest.mark.parametrize(
    "body", ["", "[]", "{", '{"a":' * 40 + "1" + "}" * 40, '{"prompt": "\\ud800"}']
)
def test_what_is_no_json_object(served: Served, body: str):
    small = error_of(post(served, COMPLETIONS, body.encode()), 400)
    large = error_of(post(served, COMPLETIONS, (PADDING + body).encode()), 400)
    assert large["message"].split(":")[0] == small["message"].split(":")[0] or not body


UNNOTICED_S = 0.05  # some of the bodies below are refused early
HOSTILE = {
    "lists": b'{"prompt": [' + b"[]," * 500_000 + b"[]]}",
    "ids": b'{"prompt": [' + b"5," * 1_500_000 + b"5]}",
    "wrong type": b'{"prompt": "x", "temperature": [' + b"[]," * 500_000 + b"[]]}",
}


def longest_wait_while_read(served: Served, body: bytes) -> tuple[float, float]:
    """Returns the longest answer of /health while `body` is read, and the time that took; in s."""
    waits_s: list[float] = []
    sent_s = [0.0]
    sent, done = threading.Event(), threading.Event()

    def parts() -> Iterator[bytes]:
        yield body[:-1]
        probe.get("/health")  # by now most of the body has arrived; only reading it is measured
        sent_s[0] = time.monotonic()
        sent.set()
        yield body[-1:]

    def ask() -> None:
        sent.wait()
        while not done.is_set():
            start_s = time.monotonic()
            assert probe.get("/health").status_code == 200
            waits_s.append(time.monotonic() - start_s)

    with httpx.Client(base_url=served.url, timeout=60) as probe:
        probe.get("/health")  # connects
        prober = threading.Thread(target=ask)
        prober.start()
        try:
            headers = {"content-type": "application/json"}
            response = httpx.post(
                served.url + COMPLETIONS, content=parts(), headers=headers, timeout=60
            )
            took_s = time.monotonic() - sent_s[0]
        finally:
            sent.set()
            done.set()
            prober.join()
    error_of(response, 400)
    assert len(response.content) < 1000
    return max(waits_s, default=took_s), took_s


@pytest.mark.parametrize("name", HOSTILE)
def test_others_are_served_while_a_large_body_is_read(served: Served, name: str):
    """The other process reads it: the loop that answers everybody is not the one that works."""
    tries: list[tuple[float, float]] = []
    # On a busy machine a probe may wait long for other reasons, but hardly every time. A loop that
    # reads the body itself lets the probe wait for all of it, every time.
    for _ in range(10):
        tries.append(longest_wait_while_read(served, HOSTILE[name]))
        wait_s, took_s = tries[-1]
        if wait_s < max(took_s / 2, UNNOTICED_S):
            return
    pytest.fail(f"longest wait and time to read, in s: {tries}")


def large_request(name: str, body: dict) -> Request:
    async def receive() -> Message:
        return {"type": "http.request", "body": json.dumps(body).encode() + PADDING.encode()}

    headers = [(b"content-type", b"application/json")]
    return Request({"type": "http", "headers": headers, "caller": Caller(name)}, receive)


def test_one_tenant_has_two_of_the_largest_bodies_in_line(served: Served):
    def read(*tenants: str, size: int = (8 << 20) - 100_000) -> list[Any]:
        async def all_at_once() -> list[Any]:
            body = {"prompt": "x", "user": "y" * size}
            reads = (served.bodies.completion(large_request(it, body)) for it in tenants)
            return await asyncio.gather(*reads, return_exceptions=True)

        return served.call(all_at_once)

    *most, third, other = read("a", "a", "a", "b")
    assert [it.prompts for it in (*most, other)] == [("x",)] * 3
    assert isinstance(third, Overloaded)
    assert third.retry_after_s == 1.0
    assert [it.prompts for it in read("a", "a")] == [("x",)] * 2  # the line is empty again
    assert [it.prompts for it in read(*"a" * 16, size=100_000)] == [("x",)] * 16


@pytest.mark.parametrize("in_message", [False, True])
def test_few_ignored_names_come_back(in_message: bool):
    unknown = dict.fromkeys(map(str, range(50_000)), 1)
    message = {"role": "user", "content": "x"}
    body = {"messages": [message | unknown]} if in_message else {"messages": [message]} | unknown
    with serving(unknown_fields=UnknownFields.IGNORE) as served:
        parsed = served.call(lambda: served.bodies.chat(large_request("a", body)))
        assert len(parsed.ignored) == 21
        answer = post(served, CHAT, json.dumps(body | {"max_tokens": 1}).encode())
        shown = answer.headers["x-jserve-ignored-fields"].split(", ")
        assert (len(shown), shown[-1]) == (21, "...")


def test_lists_of_ids_as_long_as_the_vocabulary_for_many_prompts(served: Served):
    ids = list(range(END))
    body = {"prompt": ["x"] * 32, "allowed_token_ids": ids, "n": 1, "max_tokens": 1, "seed": 0}
    answer = post(served, COMPLETIONS, json.dumps(body).encode()).json()
    assert [choice["index"] for choice in answer["choices"]] == list(range(32))
    sent = served.engine.submitted[-32:]
    assert all(it.sampling.allowed_token_ids == tuple(ids) for it in sent)
    assert len({id(it.sampling.allowed_token_ids) for it in sent}) == 1  # checked and kept once
