"""The official anthropic client, unchanged, against the gateway's Messages API."""

from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

from tests.gateway.http.agent_serving import WEATHER, Agent, call_text, serving_agent
from tests.gateway.http.http_serving import MODEL

TOOL: Any = {"name": "weather", "description": "Tells the weather.", "input_schema": WEATHER}
HI: Any = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def agent() -> Iterator[Agent]:
    with serving_agent(api_keys=("secret",)) as agent:
        yield agent


@pytest.fixture(scope="module")
def client(agent: Agent) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=agent.url, api_key="secret", max_retries=0) as client:
        yield client


def test_a_message(agent: Agent, client: anthropic.Anthropic) -> None:
    agent.says = "Grüße, 世界!"
    message = client.messages.create(model=MODEL, max_tokens=100, messages=HI)
    assert [block.to_dict() for block in message.content] == [{"type": "text", "text": agent.says}]
    assert message.stop_reason == "end_turn"
    assert message._request_id
    count = client.messages.count_tokens(model=MODEL, messages=HI)
    assert count.input_tokens == message.usage.input_tokens


def test_an_agents_loop_in_streams(agent: Agent, client: anthropic.Anthropic) -> None:
    call = call_text("weather", '{"city": "Bern"}')
    agent.says = f"<think>I don't know.</think>Let me see. {call}"
    asked: Any = {"model": MODEL, "max_tokens": 300, "tools": [TOOL]}
    asked["thinking"] = {"type": "adaptive"}
    with client.messages.stream(messages=HI, **asked) as stream:
        kinds = {event.type for event in stream}
        message = stream.get_final_message()
    assert {"thinking", "text", "input_json", "signature"} <= kinds
    assert message.stop_reason == "tool_use"
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use"]
    used = message.content[-1]
    assert used.type == "tool_use"
    assert used.input == {"city": "Bern"}
    result = {"type": "tool_result", "tool_use_id": used.id, "content": "sunny"}
    turns: Any = [*HI, message.to_param(), {"role": "user", "content": [result]}]
    agent.says = "It is sunny."
    with client.messages.stream(messages=turns, **asked) as stream:
        assert "".join(stream.text_stream) == "It is sunny."
    assert agent.prompt.endswith("tool weather: sunny\nassistant:")


def test_errors(agent: Agent, client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(model="other", max_tokens=1, messages=HI)
    with pytest.raises(anthropic.BadRequestError, match="temperature"):
        client.messages.create(
            model=MODEL, max_tokens=1, messages=HI, extra_body={"temperature": 1000}
        )
    other = client.with_options(api_key="wrong")
    with pytest.raises(anthropic.AuthenticationError):
        other.messages.create(model=MODEL, max_tokens=1, messages=HI)
