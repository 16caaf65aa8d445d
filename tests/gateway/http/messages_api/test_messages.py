"""The Anthropic Messages API: what is asked, and what is answered, whole and streamed."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.gateway.http.agent_serving import WEATHER, Agent, call_text, serving_agent
from tests.gateway.http.http_serving import MODEL

PATH = "/v1/messages"
TOOL = {"name": "weather", "description": "Tells the weather.", "input_schema": WEATHER}
CALL = call_text("weather", '{"city": "Bern"}')


@pytest.fixture(scope="module")
def agent() -> Iterator[Agent]:
    with serving_agent() as agent:
        yield agent


def body(*messages: Any, **fields: Any) -> dict[str, Any]:
    turns = messages or ({"role": "user", "content": "hi"},)
    return {"model": MODEL, "max_tokens": 200, "messages": list(turns), **fields}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def post(agent: Agent, asked: dict[str, Any], path: str = PATH) -> dict[str, Any]:
    response = httpx.post(agent.url + path, json=asked)
    assert response.status_code == 200, response.text
    return response.json()


def stream(agent: Agent, asked: dict[str, Any]) -> list[dict[str, Any]]:
    response = httpx.post(agent.url + PATH, json=asked | {"stream": True})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    events: list[dict[str, Any]] = []
    for text in response.text.removesuffix("\n\n").split("\n\n"):
        name, data = text.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def joined(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The message that a client makes of the events; checks their order."""
    assert events[0]["type"] == "message_start"
    assert [event["type"] for event in events[-2:]] == ["message_delta", "message_stop"]
    message = events[0]["message"]
    assert message["content"] == []
    inputs: dict[int, str] = {}
    open_block: int | None = None
    for event in events[1:-2]:
        match event["type"]:
            case "content_block_start":
                assert open_block is None
                open_block = event["index"]
                assert open_block == len(message["content"])
                message["content"].append(event["content_block"])
            case "content_block_stop":
                assert open_block == event["index"]
                open_block = None
            case "content_block_delta":
                assert open_block == event["index"]
                block, delta = message["content"][-1], event["delta"]
                kind = delta.pop("type")
                if kind == "input_json_delta":
                    inputs[open_block] = inputs.get(open_block, "") + delta["partial_json"]
                else:
                    (field,) = delta
                    assert kind == f"{field}_delta"
                    block[field] += delta[field]
    assert open_block is None
    for index, text in inputs.items():
        message["content"][index]["input"] = json.loads(text)
    return message | events[-2]["delta"] | {"usage": events[-2]["usage"]}


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    content = [{**block, "id": ""} if "id" in block else block for block in message["content"]]
    return message | {"id": "", "content": content}


def both(agent: Agent, asked: dict[str, Any]) -> dict[str, Any]:
    """The whole answer, which the streamed one equals."""
    whole = post(agent, asked)
    assert without_ids(joined(stream(agent, asked))) == without_ids(whole)
    return whole


def test_text(agent: Agent) -> None:
    agent.says = "Grüße, 世界!"
    message = both(agent, body(system="Be kind."))
    assert agent.prompt == "system: Be kind.\nuser: hi\nassistant:"
    assert message["id"].startswith("msg_")
    assert (message["type"], message["role"], message["model"]) == ("message", "assistant", MODEL)
    assert message["content"] == [{"type": "text", "text": agent.says}]
    assert (message["stop_reason"], message["stop_sequence"]) == ("end_turn", None)
    assert message["usage"] == {
        "input_tokens": len(agent.prompt),
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 0,
        "output_tokens": len(agent.says.encode()) + 1,
        "output_tokens_details": {"thinking_tokens": 0},
    }


def test_cached_tokens() -> None:
    with serving_agent(cached=lambda request: 5) as agent:
        message = both(agent, body())
        assert message["usage"]["cache_read_input_tokens"] == 5
        assert message["usage"]["input_tokens"] == len(agent.prompt) - 5
        start = stream(agent, body())[0]["message"]
        assert start["usage"]["cache_read_input_tokens"] == 5


def test_the_ends(agent: Agent) -> None:
    agent.says = "one two three"
    message = both(agent, body(max_tokens=3))
    assert message["content"] == [{"type": "text", "text": "one"}]
    assert message["stop_reason"] == "max_tokens"
    message = both(agent, body(stop_sequences=["four", " two"]))
    assert message["content"] == [{"type": "text", "text": "one"}]
    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", " two")
    agent.says = "x" * 5000
    message = both(agent, body(max_tokens=100_000))
    assert message["stop_reason"] == "model_context_window_exceeded"
    assert message["usage"]["output_tokens"] == 4096 - len(agent.prompt)


def test_blocks_of_text(agent: Agent) -> None:
    cached = {"type": "ephemeral"}
    blocks = [{"type": "text", "text": text, "cache_control": cached} for text in ("a", "b")]
    post(agent, body(user(blocks), user("c"), system=blocks))
    assert agent.prompt == "system: a\nb\nuser: a\nb\nc\nassistant:"


def test_prefill(agent: Agent) -> None:
    agent.says = "B)"
    message = both(agent, body(user("Which?"), {"role": "assistant", "content": "It is ("}))
    assert agent.prompt == "user: Which?\nassistant: It is ("
    assert message["content"] == [{"type": "text", "text": "B)"}]
    post(agent, body(user("Which?"), {"role": "assistant", "content": []}))
    assert agent.prompt == "user: Which?\nassistant:"


def test_a_call_of_a_tool(agent: Agent) -> None:
    agent.says = f"Let me see. {CALL}"
    message = both(agent, body(tools=[TOOL]))
    assert '"name": "weather"' in agent.prompt
    text, call = message["content"]
    assert text == {"type": "text", "text": "Let me see."}
    assert call["type"] == "tool_use"
    assert call["id"]
    assert (call["name"], call["input"]) == ("weather", {"city": "Bern"})
    assert message["stop_reason"] == "tool_use"
    result = {"type": "tool_result", "tool_use_id": call["id"]}
    turns = [user("hi"), {"role": "assistant", "content": message["content"]}]
    agent.says = "Sunny."
    for content in ("sunny", [{"type": "text", "text": "sunny"}]):
        post(agent, body(*turns, user([result | {"content": content}]), tools=[TOOL]))
        assert agent.prompt.endswith(
            'assistant: Let me see.<tool_call>{"name": "weather", "arguments": {"city": "Bern"}}'
            "</tool_call>\ntool weather: sunny\nassistant:"
        )
    failed = [result | {"content": "no such city", "is_error": True}, {"type": "text", "text": "?"}]
    post(agent, body(*turns, user(failed), tools=[TOOL]))
    assert agent.prompt.endswith("tool weather: Error: no such city\nuser: ?\nassistant:")


@pytest.mark.parametrize(
    "choice", [{"type": "any"}, {"type": "tool", "name": "weather"}, {"type": "auto"}]
)
def test_choices_of_tools(agent: Agent, choice: dict[str, Any]) -> None:
    agent.says = CALL
    message = both(agent, body(tools=[TOOL], tool_choice=choice))
    assert [block["type"] for block in message["content"]] == ["tool_use"]
    assert message["stop_reason"] == "tool_use"
    bound = agent.request.constraint is not None
    assert bound is (choice["type"] != "auto")


def test_no_tool_may_be_called(agent: Agent) -> None:
    agent.says = CALL
    message = both(agent, body(tools=[TOOL], tool_choice={"type": "none"}))
    assert message["content"] == [{"type": "text", "text": CALL}]
    assert "tools" not in agent.prompt


def test_parallel_calls_and_at_most_one(agent: Agent) -> None:
    agent.says = f"{CALL}\n{CALL}"
    message = both(agent, body(tools=[TOOL]))
    assert [block["type"] for block in message["content"]] == ["tool_use"] * 2
    asked = body(tools=[TOOL], tool_choice={"type": "auto", "disable_parallel_tool_use": True})
    message = post(agent, asked)
    assert [block["type"] for block in message["content"]] == ["tool_use"]
    assert message["stop_reason"] == "tool_use"
    assert len(joined(stream(agent, asked))["content"]) == 1


def test_a_call_that_is_cut_off(agent: Agent) -> None:
    agent.says = CALL
    message = post(agent, body(tools=[TOOL], max_tokens=len(CALL) - 20))
    assert message["content"][0]["input"] == {}
    assert message["stop_reason"] == "max_tokens"


def test_thinking(agent: Agent) -> None:
    agent.says = "<think>Hm, well.</think>Yes."
    asked = body(thinking={"type": "enabled", "budget_tokens": 50})
    message = both(agent, asked)
    thought, text = message["content"]
    assert thought["thinking"] == "Hm, well."
    assert thought["signature"]
    assert text == {"type": "text", "text": "Yes."}
    thinking_tokens = message["usage"]["output_tokens_details"]["thinking_tokens"]
    assert 0 < thinking_tokens < message["usage"]["output_tokens"]
    constraint = agent.request.constraint
    assert constraint is not None
    assert constraint.max_reasoning_tokens == 50
    # It can come back.
    post(agent, body(user("hi"), {"role": "assistant", "content": message["content"]}, user("?")))
    assert "assistant: <think>Hm, well.</think>Yes.\nuser: ?" in agent.prompt
    message = both(agent, body(thinking={"type": "adaptive", "display": "omitted"}))
    assert message["content"][0]["thinking"] == ""
    assert message["content"][0]["signature"]
    agent.says = "Yes."
    post(agent, body(thinking={"type": "disabled"}))
    assert agent.prompt.endswith("assistant:<think></think>")


@pytest.mark.parametrize(
    "field",
    [
        {"output_config": {"format": {"type": "json_schema", "schema": WEATHER}}},
        {"output_format": {"type": "json_schema", "schema": WEATHER}},
    ],
)
def test_a_schema_binds_the_answer(agent: Agent, field: dict[str, Any]) -> None:
    agent.says = '{"city": "Bern"}'
    assert both(agent, body(**field))["content"] == [{"type": "text", "text": agent.says}]
    constraint = agent.request.constraint
    assert constraint is not None
    assert "city" in constraint.grammar


def test_sampling(agent: Agent) -> None:
    agent.says = "ok"
    post(agent, body(temperature=0.5, top_k=7.0, top_p=0.9, max_tokens=11))
    sampling = agent.request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.5, 7, 0.9)
    assert sampling.max_tokens == 11


@pytest.mark.parametrize(
    "field",
    [
        {"metadata": {"user_id": "me"}},
        {"service_tier": "auto"},
        {"cache_control": {"type": "ephemeral"}},
        {"tools": []},
        {"container": None},
        {"output_config": {"effort": "low"}},
        {"tools": [TOOL | {"type": "custom", "cache_control": {"type": "ephemeral"}}]},
    ],
)
def test_accepted(agent: Agent, field: dict[str, Any]) -> None:
    agent.says = "ok"
    post(agent, body(**field))


def test_count_tokens(agent: Agent) -> None:
    asked = body(system="Be kind.", tools=[TOOL])
    agent.says = "ok"
    used = post(agent, asked)["usage"]["input_tokens"]
    del asked["max_tokens"]
    assert post(agent, asked, f"{PATH}/count_tokens") == {"input_tokens": used}


def test_a_large_body(agent: Agent) -> None:
    text = "a" * 100_000
    response = httpx.post(agent.url + PATH, json=body(user(text)), timeout=60)
    assert response.status_code == 400
    assert "prompt is too long" in response.json()["error"]["message"]
    small = [user("a"), {"role": "assistant", "content": "b"}] * 20
    padding = {"user_id": "x" * 100_000}
    agent.says = "ok"
    asked = body(*small, user("c"), metadata=padding, tools=[TOOL])
    response = httpx.post(agent.url + PATH, json=asked, timeout=60)
    assert response.status_code == 200, response.text
    assert agent.prompt.endswith("user: c\nassistant:")
