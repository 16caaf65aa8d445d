"""What the Responses API refuses: one clear error that names the field."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from jserve.gateway.config import UnknownFields
from tests.gateway.http.http_serving import MODEL, Served, error_of
from tests.gateway.http.responses.responding import RESPONSES, WEATHER, responding


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with responding() as (served, _, _):
        yield served


def post(served: Served, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(served.url + RESPONSES, json=body, timeout=30)


def message(*parts: Any) -> dict[str, Any]:
    return {"input": [{"role": "user", "content": list(parts)}]}


def item(**fields: Any) -> dict[str, Any]:
    return {"input": [fields]}


CALL = {"type": "function_call", "call_id": "c", "name": "f"}


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("input", {"input": None}),
        ("input", {"input": 3}),
        ("input", {"input": []}),
        ("input", {"input": [{"role": "user", "content": "a"}] * 5000}),
        ("input[0]", {"input": ["a"]}),
        ("input[0].id", {"input": [{}]}),
        ("input[0].type", item(type="web_search_call", id="ws_1")),
        ("input[0].role", item(role="tool", content="a")),
        ("input[0].role", item(type="message", content="a")),
        ("input[0].content", item(role="user")),
        ("input[0].content[0]", message("a")),
        ("input[0].content[0].type", message({"type": "input_image", "image_url": "http://x"})),
        ("input[0].content[0].type", message({"type": "input_file", "file_id": "f"})),
        ("input[0].content[0].text", message({"type": "input_text", "text": 1})),
        ("input[0].nonsense", item(role="user", content="a", nonsense=1)),
        ("input[0].arguments", item(**CALL)),
        ("input[0].arguments", item(**CALL, arguments="{")),
        ("input[0].arguments", item(**CALL, arguments="[" * 100_000)),
        ("input[0].arguments", item(**CALL, arguments="[]")),
        ("input", item(type="function_call_output", call_id="c", output="1")),
        ("input[0].output", item(type="function_call_output", call_id="c", output={"a": 1})),
        ("input[0].summary[0].text", item(type="reasoning", id="r", summary=[{}])),
        ("input", {"input": "a" * 5000}),
        ("input", message(*[{"type": "input_text", "text": ""}] * 20_000)),
        ("tools", {"tools": [WEATHER | {"parameters": {"enum": ["a"] * 300_000}}]}),
        ("instructions", {"instructions": [{"role": "user", "content": "a"}]}),
        ("max_output_tokens", {"max_output_tokens": 0}),
        ("max_output_tokens", {"max_output_tokens": "5"}),
        ("max_tokens", {"max_tokens": 5}),
        ("temperature", {"temperature": -1}),
        ("temperature", {"temperature": "hot"}),
        ("top_p", {"top_p": 2}),
        ("top_logprobs", {"top_logprobs": 21}),
        ("include", {"include": "message.output_text.logprobs"}),
        ("truncation", {"truncation": "middle"}),
        ("metadata.a", {"metadata": {"a": 1}}),
        ("metadata", {"metadata": {str(i): "" for i in range(17)}}),
        ("metadata", {"metadata": {"a": "b" * 513}}),
        ("reasoning", {"reasoning": "high"}),
        ("reasoning.effort", {"reasoning": {"effort": 3}}),
        ("reasoning.mode", {"reasoning": {"mode": "pro"}}),
        ("text.format.type", {"text": {"format": {"type": "xml"}}}),
        ("text.format.schema", {"text": {"format": {"type": "json_schema", "name": "a"}}}),
        (
            "text.format.schema",
            {"text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": "no"}}}},
        ),
        (
            "structured_outputs.regex",
            {
                "text": {"format": {"type": "json_object"}},
                "structured_outputs": {"regex": "a"},
            },
        ),
        ("tools", {"tools": {}}),
        ("tools[0]", {"tools": ["f"]}),
        ("tools[0].type", {"tools": [{"type": "web_search"}]}),
        ("tools[0].type", {"tools": [{"type": "mcp", "server_label": "a", "server_url": "b"}]}),
        ("tools[0].type", {"tools": [{"type": "file_search", "vector_store_ids": ["a"]}]}),
        ("tools[0].type", {"tools": [{"type": "custom", "name": "f"}]}),
        ("tools[0].name", {"tools": [{"type": "function", "function": {"name": "f"}}]}),
        ("tools[0].name", {"tools": [{"type": "function", "name": ""}]}),
        ("tools[0].parameters", {"tools": [{"type": "function", "name": "f", "parameters": 3}]}),
        ("tools[0].defer_loading", {"tools": [WEATHER | {"defer_loading": True}]}),
        ("tools[1].name", {"tools": [WEATHER, WEATHER]}),
        ("tools", {"tools": [WEATHER | {"name": str(i)} for i in range(513)]}),
        ("tool_choice", {"tool_choice": "required"}),
        ("tool_choice", {"tool_choice": "always"}),
        ("tool_choice", {"tools": [WEATHER], "tool_choice": {"type": "function", "name": "f"}}),
        ("tool_choice.name", {"tools": [WEATHER], "tool_choice": {"type": "function"}}),
        ("tool_choice.type", {"tool_choice": {"type": "file_search"}}),
        ("tool_choice.mode", {"tool_choice": {"type": "allowed_tools", "tools": []}}),
        (
            "tool_choice",
            {"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"name": "f"}]}},
        ),
        ("stream", {"stream": "yes"}),
        ("stream_options", {"stream_options": {}}),
        ("store", {"store": 1}),
        ("conversation", {"conversation": "conv_1"}),
        ("prompt", {"prompt": {"id": "pmpt_1"}}),
        ("context_management", {"context_management": [{"type": "compaction"}]}),
        ("n", {"n": 2}),
        ("messages", {"messages": []}),
    ],
)
def test_names_the_field(served: Served, param: str, fields: dict[str, Any]):
    answer = post(served, {"model": MODEL, "input": "hi"} | fields)
    assert error_of(answer, 400)["param"] == param
    large = post(served, {"model": MODEL, "input": "hi", "user": "u" * 70_000} | fields)
    assert error_of(large, 400)["param"] == param


def test_another_model(served: Served):
    error = error_of(post(served, {"model": "another", "input": "hi"}), 404)
    assert error["code"] == "model_not_found"


def test_unknown_fields_are_named_where_they_are_ignored():
    with responding(unknown_fields=UnknownFields.IGNORE) as (served, _, _):
        body = message({"type": "input_text", "text": "a", "x": 1}) | {"y": 2, "tools": [WEATHER]}
        answer = post(served, body)
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-jserve-ignored-fields"] == "input[0].content[0].x, y"


def test_a_model_without_tools():
    with responding(chat_template="{{ messages[0].content }}") as (served, _, _):
        error = error_of(post(served, {"input": "hi", "tools": [WEATHER]}), 400)
        assert error["param"] == "tools"
        assert post(served, {"input": "hi"}).json()["status"] == "completed"


def test_a_stream_that_is_fetched(served: Served):
    made = post(served, {"input": "hi"}).json()["id"]
    error = error_of(httpx.get(f"{served.url}{RESPONSES}/{made}?stream=true"), 400)
    assert error["param"] == "stream"
