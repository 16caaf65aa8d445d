"""Bad input gets one clear error in OpenAI's shape, and the server goes on serving."""

import contextlib
import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from tests.gateway.http.http_serving import (
    CHAT,
    COMPLETIONS,
    END,
    MODEL,
    Served,
    error_of,
    serving,
)

JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as served:
        yield served


@pytest.fixture(scope="module")
def http(served: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=served.url) as client:
        yield client


@pytest.fixture(autouse=True)
def still_serving(served: Served, http: httpx.Client) -> Iterator[None]:
    yield
    answer = http.post(COMPLETIONS, json={"prompt": "ab", "max_tokens": 4})
    assert answer.json()["choices"][0]["text"] == "abab"
    served.assert_idle()


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("prompt", {"prompt": ""}),
        ("prompt", {"prompt": []}),
        ("prompt", {"prompt": ["a", ""]}),
        ("prompt", {"prompt": [[1], []]}),
        ("prompt", {"prompt": [1, END + 1]}),
        ("prompt", {"prompt": [1, -1]}),
        ("prompt", {"prompt": [2**63]}),
        ("prompt", {"prompt": {"text": "a"}}),
        ("prompt", {"prompt": ["a"] * 1000}),
        ("prompt", {"prompt": "a" * 5000}),
        ("max_tokens", {"max_tokens": 4096}),
        ("max_tokens", {"max_tokens": -2}),
        ("max_tokens", {"max_tokens": 0}),
        ("max_tokens", {"max_tokens": "5"}),
        ("max_tokens", {"max_tokens": 5.5}),
        ("temperature", {"temperature": -0.1}),
        ("temperature", {"temperature": "hot"}),
        ("temperature", {"temperature": True}),
        ("top_p", {"top_p": 0}),
        ("top_p", {"top_p": 1.1}),
        ("top_k", {"top_k": -2}),
        ("min_p", {"min_p": -1}),
        ("repetition_penalty", {"repetition_penalty": 0}),
        ("presence_penalty", {"presence_penalty": 3}),
        ("frequency_penalty", {"frequency_penalty": -3}),
        ("logprobs", {"logprobs": 21}),
        ("logprobs", {"logprobs": -1}),
        ("prompt_logprobs", {"prompt_logprobs": True}),
        ("seed", {"seed": 2**70}),
        ("seed", {"seed": -(2**63) - 1}),
        ("seed", {"seed": 2**63}),
        ("seed", {"seed": 0.5}),
        ("seed", {"seed": "7"}),
        ("n", {"n": 0}),
        ("n", {"n": 10**9}),
        ("stop", {"stop": ""}),
        ("stop", {"stop": ["a", 1]}),
        ("stop", {"stop": ["x"] * 1000}),
        ("stop_token_ids", {"stop_token_ids": [999]}),
        ("stop_token_ids", {"stop_token_ids": list(range(100))}),
        ("logit_bias", {"logit_bias": {"x": 1}}),
        ("logit_bias", {"logit_bias": {"999": 1}}),
        ("logit_bias.5", {"logit_bias": {"5": "much"}}),
        ("logit_bias", {"logit_bias": [1]}),
        ("allowed_token_ids", {"allowed_token_ids": [-5]}),
        ("min_tokens", {"min_tokens": 9, "max_tokens": 8}),
        ("ignore_eos", {"ignore_eos": 1}),
        ("priority", {"priority": 2**40}),
        ("suffix", {"suffix": "tail"}),
        ("best_of", {"best_of": 1, "n": 2}),
        ("stream_options", {"stream_options": {"include_usage": True}}),
        ("temprature", {"temprature": 1}),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_fields(http: httpx.Client, param: str, fields: dict[str, Any], stream: bool) -> None:
    if "stream_options" in fields and stream:
        fields = {"stream_options": {"include_usage": 5}}
        param = "stream_options.include_usage"
    body = {"prompt": "a", "max_tokens": 5, "stream": stream, **fields}
    error = error_of(http.post(COMPLETIONS, json=body), 400)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert param.split(".")[0] in error["message"]


def test_the_context_length_has_a_code(http: httpx.Client) -> None:
    for body in ({"prompt": "a" * 5000}, {"prompt": "a", "max_tokens": 4096}):
        error = error_of(http.post(COMPLETIONS, json=body), 400)
        assert error["code"] == "context_length_exceeded"
        # LiteLLM, and what is built on it, knows the error by these words.
        assert "this model's maximum context length is 4096 tokens" in error["message"].lower()


@pytest.mark.parametrize("seed", [-(2**63) - 1, 2**63, 2**64, 2**70, -(2**70), 1e300])
def test_a_seed_out_of_range_is_called_so(http: httpx.Client, seed: float) -> None:
    error = error_of(http.post(COMPLETIONS, json={"prompt": "a", "seed": seed}), 400)
    assert error["param"] == "seed"
    assert "from -9223372036854775808 to 9223372036854775807" in error["message"]


@pytest.mark.parametrize(
    "messages",
    [
        None,
        [],
        "hi",
        [5],
        [{}],
        [{"role": "user"}],
        [{"role": "user", "content": None}],
        [{"role": 5, "content": "x"}],
        [{"role": "tool", "content": 5}],
        [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
        [{"role": "user", "content": "x", "function_call": {"name": "f"}}],
        [{"role": "user", "content": "x", "weight": 1}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        [{"role": "user", "content": [{"type": "text", "text": 5}]}],
        [{"role": "user", "content": "x"}] * 5000,
    ],
)
def test_messages(http: httpx.Client, messages: object) -> None:
    error = error_of(http.post(CHAT, json={"messages": messages}), 400)
    assert (error["param"] or "").startswith("messages")


def test_a_template_without_tools(http: httpx.Client) -> None:
    body = {"messages": [{"role": "user", "content": "x"}]}
    body |= {"tools": [{"type": "function", "function": {"name": "f"}}]}
    error = error_of(http.post(CHAT, json=body), 400)
    assert error["param"] == "tools"
    assert "gateway.tool_parser" in error["message"]
    assert http.post(CHAT, json=body | {"tool_choice": "none", "max_tokens": 1}).is_success


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[1]",
        b'"text"',
        b"null",
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": Infinity}',
        b'{"prompt": "a", "temperature": -Infinity}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "a",}',
        b"{'prompt': 'a'}",
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\xff"}',
        b'{"prompt": "a"} x',
        b"[" * 100_000,
        b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"prompt": "a", "metadata": ' + b'{"a":' * 200 + b"1" + b"}" * 201,
        b'{"a":' * 500_000,
    ],
    ids=lambda body: repr(body[:30]),
)
def test_bodies(http: httpx.Client, body: bytes) -> None:
    error = error_of(http.post(COMPLETIONS, content=body, headers=JSON), 400)
    assert error["type"] == "invalid_request_error"


def test_a_body_of_10_mb(http: httpx.Client) -> None:
    body = json.dumps({"prompt": "a" * 10_000_000}).encode()
    error = error_of(http.post(COMPLETIONS, content=body, headers=JSON), 413)
    assert error["code"] == "request_too_large"
    # The same holds without a content-length.
    chunks = (body[i : i + 100_000] for i in range(0, len(body), 100_000))
    error_of(http.post(COMPLETIONS, content=chunks, headers=JSON), 413)


def test_a_body_without_end_is_cut_off() -> None:
    with (
        serving(max_body_bytes=10_000) as served,
        socket.create_connection(("127.0.0.1", served.port)) as raw,
    ):
        raw.settimeout(10)
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        raw.sendall(head.encode() + b"transfer-encoding: chunked\r\n\r\n")
        sent = 0
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while sent < 100_000_000:
                raw.sendall(b"10000\r\n" + b"x" * 0x10000 + b"\r\n")
                sent += 0x10000
        assert sent < 50_000_000


@pytest.mark.parametrize(
    "start", [b"GET /", b"GET / HTTP/1.1\r\nx: ", b"GET / HTTP/1.1\r\nx:y\r\n"]
)
def test_a_head_without_end_is_cut_off(served: Served, start: bytes) -> None:
    more = b"x:y\r\n" * 5000 if start.endswith(b"\n") else b"x" * 30_000
    with socket.create_connection(("127.0.0.1", served.port)) as raw:
        raw.settimeout(10)
        raw.sendall(start)
        sent = 0
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while sent < 50_000_000:
                raw.sendall(more)
                sent += len(more)
        assert sent < 20_000_000


@pytest.mark.parametrize(
    "content_type", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"]
)
def test_content_types(http: httpx.Client, content_type: str | None) -> None:
    headers = {} if content_type is None else {"content-type": content_type}
    response = http.post(COMPLETIONS, content=b'{"prompt": "a"}', headers=headers)
    assert "application/json" in error_of(response, 415)["message"]


def test_json_by_other_spellings(http: httpx.Client) -> None:
    body = b'{"prompt": "a", "max_tokens": 1}'
    headers = {"content-type": "Application/JSON; charset=UTF-8"}
    assert http.post(COMPLETIONS, content=body, headers=headers).status_code == 200
    error_of(http.post(COMPLETIONS, content=body, headers=JSON | {"content-encoding": "gzip"}), 415)


def test_unknown_models(http: httpx.Client, served: Served) -> None:
    for response in (
        http.post(COMPLETIONS, json={"model": "other", "prompt": "a"}),
        http.post(CHAT, json={"model": "other", "messages": [{"role": "user", "content": "a"}]}),
        http.post("/tokenize", json={"model": "other", "prompt": "a"}),
        http.get("/v1/models/other"),
    ):
        assert error_of(response, 404)["code"] == "model_not_found"
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=0) as client:
        with pytest.raises(openai.NotFoundError, match=MODEL):
            client.completions.create(model="other", prompt="a")
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model=MODEL, prompt="a", temperature=-1)
    assert caught.value.param == "temperature"


def test_unknown_urls_and_methods(http: httpx.Client) -> None:
    assert error_of(http.get("/v2/none"), 404)["code"] == "unknown_url"
    response = http.get(COMPLETIONS)
    assert error_of(response, 405)["code"] == "method_not_allowed"
    assert response.headers["allow"] == "POST"
    error_of(http.put("/v1/models"), 405)


def test_tokenize_errors(http: httpx.Client) -> None:
    for path, body in (
        ("/tokenize", {}),
        ("/tokenize", {"prompt": 5}),
        ("/tokenize", {"prompt": "a", "messages": []}),
        ("/tokenize", {"prompt": "a", "nonsense": 1}),
        ("/detokenize", {}),
        ("/detokenize", {"tokens": [END + 1]}),
        ("/detokenize", {"tokens": ["a"]}),
        ("/detokenize", {"tokens": "abc"}),
    ):
        error_of(http.post(path, json=body), 400)


@pytest.mark.parametrize("stream", [False, True])
def test_a_template_that_raises(http: httpx.Client, stream: bool) -> None:
    body = {"messages": [{"role": "user", "content": "boom"}], "stream": stream}
    error = error_of(http.post(CHAT, json=body), 400)
    assert "no boom please" in error["message"]
    assert error["param"] == "messages"


def test_a_model_without_a_template() -> None:
    with serving(chat_template=None) as served:
        body = {"messages": [{"role": "user", "content": "x"}]}
        error = error_of(httpx.post(served.url + CHAT, json=body), 400)
        assert "chat template" in error["message"]
        assert "completions" in error["message"]


def test_raw_garbage(served: Served) -> None:
    for garbage in (
        b"\x00\x01\x02\r\n\r\n",
        b"GET\r\n\r\n",
        b"POST / HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01",
    ):
        with socket.create_connection(("127.0.0.1", served.port)) as raw:
            raw.settimeout(2)
            raw.sendall(garbage)
            assert raw.recv(100).startswith(b"HTTP/1.1 400")
