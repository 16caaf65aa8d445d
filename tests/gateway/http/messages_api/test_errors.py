"""Errors of the Anthropic Messages API, in its own shape from every layer."""

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.gateway.http.agent_serving import WEATHER, Agent, serving_agent
from tests.gateway.http.http_serving import MODEL, serving

PATH = "/v1/messages"
COUNT = f"{PATH}/count_tokens"
TOOL = {"name": "weather", "input_schema": WEATHER}


@pytest.fixture(scope="module")
def agent() -> Iterator[Agent]:
    with serving_agent() as agent:
        yield agent


def body(**fields: Any) -> dict[str, Any]:
    asked = {
        "model": MODEL,
        "max_tokens": 20,
        "messages": [{"role": "user", "content": "hi"}],
        **fields,
    }
    return {name: value for name, value in asked.items() if value is not None}


def error_of(response: httpx.Response, status: int, kind: str) -> str:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    data = response.json()
    assert data.keys() == {"type", "error", "request_id"}
    assert data["type"] == "error"
    assert data["error"].keys() == {"type", "message"}
    assert data["error"]["type"] == kind
    assert data["request_id"] == response.headers["request-id"]
    return data["error"]["message"]


def content(*blocks: dict[str, Any], role: str = "user") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": list(blocks)}]}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_tokens": None}, "max_tokens is missing"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"max_tokens": "1"}, "max_tokens must be an integer"),
        ({"messages": []}, "messages must be a list"),
        ({"messages": [{"role": "tool", "content": ""}]}, "messages[0].role must be one of"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages[0].content must be a string"),
        ({"messages": [1]}, "messages[0] must be an object"),
        (content({"type": "image", "source": {}}), "content of type 'image' is not supported"),
        (content({"type": "document", "source": {}}), "content of type 'document'"),
        (content({"type": "tool_use", "id": "1", "name": "a"}), "content of type 'tool_use'"),
        (content({"type": "text"}), "messages[0].content[0].text is missing"),
        (content({"type": "tool_result"}), "tool_use_id is missing"),
        (
            content({"type": "tool_result", "tool_use_id": "1", "content": [{"type": "image"}]}),
            "messages[0].content[0].content[0]: content of type 'image'",
        ),
        (
            content({"type": "tool_use", "id": "1", "name": "a", "input": {}}, role="assistant"),
            "the last one calls tools",
        ),
        ({"system": 3}, "system must be"),
        ({"stop_sequences": "x"}, "stop_sequences must be a list"),
        ({"temperature": 1000}, "temperature"),
        ({"tools": [{"type": "web_search_20250305", "name": "w"}]}, "web_search_20250305"),
        ({"tools": [{"name": "w"}]}, "tools[0].input_schema is missing"),
        ({"tools": [TOOL, TOOL]}, "another tool of the name 'weather'"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "x"}}, "'x'"),
        ({"tools": [TOOL], "tool_choice": {"type": "all"}}, "tool_choice.type must be"),
        ({"tool_choice": {"type": "any"}}, "there are no tools"),
        ({"thinking": {"type": "between_tools"}}, "thinking.type 'between_tools'"),
        ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens must be"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format.type must be"),
        ({"mcp_servers": [{}]}, "mcp_servers: not supported yet"),
        ({"context_management": {"edits": [{}]}}, "context_management: not supported yet"),
        ({"max_token": 3}, "did you mean 'max_tokens'"),
    ],
)
def test_bad_fields(agent: Agent, fields: dict[str, Any], words: str) -> None:
    response = httpx.post(agent.url + PATH, json=body(**fields))
    assert words in error_of(response, 400, "invalid_request_error")


def test_other_errors(agent: Agent) -> None:
    url = agent.url
    error_of(httpx.post(url + PATH, json=body(model="other")), 404, "not_found_error")
    error_of(httpx.post(url + COUNT, json=body(model="other")), 404, "not_found_error")
    error_of(httpx.get(url + PATH), 405, "invalid_request_error")
    error_of(httpx.get(f"{url}{PATH}/batches"), 404, "not_found_error")
    error_of(httpx.post(url + PATH, content=b"{}"), 415, "invalid_request_error")
    wrong = httpx.post(url + PATH, json=body(), headers={"host": "evil.example"})
    error_of(wrong, 400, "invalid_request_error")
    json_body = {"content-type": "application/json"}
    large = httpx.post(url + PATH, content=b" " * (9 << 20), headers=json_body)
    error_of(large, 413, "request_too_large")
    # Other paths keep OpenAI's shape.
    assert httpx.get(f"{url}/v1/messagesx").json()["error"]["code"] == "unknown_url"


def test_too_many_at_a_time() -> None:
    with serving_agent(max_tenant_sequences=1, step_s=0.05) as slow:
        slow.says = "x" * 100
        with httpx.stream(
            "POST", slow.url + PATH, json=body(max_tokens=100, stream=True)
        ) as response:
            lines = response.iter_lines()
            next(lines)
            refused = httpx.post(slow.url + PATH, json=body())
            error_of(refused, 429, "rate_limit_error")
            assert refused.headers["retry-after"] == "1"


def test_keys() -> None:
    with serving(api_keys=("secret",)) as served:
        url = served.url + PATH
        error_of(httpx.post(url, json=body()), 401, "authentication_error")
        wrong = httpx.post(url, json=body(), headers={"x-api-key": "other"})
        error_of(wrong, 401, "authentication_error")
        for header in ({"x-api-key": "secret"}, {"authorization": "Bearer secret"}):
            headers = header | {"anthropic-version": "2023-06-01"}
            assert httpx.post(url, json=body(), headers=headers).status_code == 200
        key = {"x-api-key": "secret"}
        assert httpx.get(f"{served.url}/v1/models", headers=key).status_code == 200


def test_an_engine_that_is_away_and_one_that_dies() -> None:
    with serving(step_s=0.02) as served:
        url = served.url + PATH
        served.do(served.engine.crash)
        error_of(httpx.post(url, json=body()), 503, "overloaded_error")
        served.do(served.engine.restart)
        with httpx.stream("POST", url, json=body(stream=True, max_tokens=4000)) as response:
            lines = response.iter_lines()
            assert next(lines) == "event: message_start"
            served.do(served.engine.crash)
            rest = list(lines)
        at = rest.index("event: error")
        data = json.loads(rest[at + 1].removeprefix("data: "))
        assert data["error"]["type"] == "api_error"
        assert data["request_id"] == response.headers["request-id"]
        assert not [line for line in rest[at + 2 :] if line]


def test_pings_while_nothing_comes() -> None:
    with serving(step_s=0.4, sse_keep_alive_s=0.1) as served:
        text = httpx.post(served.url + PATH, json=body(stream=True, max_tokens=1)).text
        assert text.startswith('event: ping\ndata: {"type":"ping"}\n\n')
        assert text.count("event: message_start") == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_the_engine(stream: bool) -> None:
    with serving(step_s=0.005) as served:
        data = json.dumps(body(stream=stream, max_tokens=4000)).encode()
        head = f"POST {PATH} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", served.port)) as raw:
            raw.sendall(head.encode() + b"content-length: %d\r\n\r\n" % len(data) + data)
            while not served.engine.stats.num_running:
                time.sleep(0.002)
        served.assert_idle(timeout_s=5.0)
        assert len(served.engine.aborted) == 1
