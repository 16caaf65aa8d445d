"""The official ollama client, unchanged, against the gateway's Ollama API."""

from collections.abc import Iterator
from typing import Any

import ollama
import pytest

from tests.gateway.http.agent_serving import WEATHER, Agent, call_text, serving_agent
from tests.gateway.http.http_serving import MODEL

HI = [{"role": "user", "content": "hi"}]


def weather(city: str) -> str:
    """Tells the weather.

    Args:
      city: A city.

    Returns:
      str: The weather.
    """
    return f"sunny in {city}"


@pytest.fixture(scope="module")
def agent() -> Iterator[Agent]:
    with serving_agent() as agent:
        yield agent


@pytest.fixture(scope="module")
def client(agent: Agent) -> Iterator[ollama.Client]:
    with ollama.Client(host=agent.url) as client:
        yield client


def test_chat_and_generate(agent: Agent, client: ollama.Client) -> None:
    agent.says = "<think>Hm.</think>Grüße, 世界!"
    answer = client.chat(model=MODEL, messages=HI, think=True)
    assert (answer.message.content, answer.message.thinking) == ("Grüße, 世界!", "Hm.")
    assert (answer.done, answer.done_reason) == (True, "stop")
    assert answer.eval_count == len(agent.says.encode()) + 1
    pieces = list(client.chat(model=MODEL, messages=HI, stream=True))
    assert "".join(piece.message.content or "" for piece in pieces) == "Grüße, 世界!"
    pieces = list(client.generate(model=MODEL, prompt="hi", stream=True))
    assert "".join(piece.response or "" for piece in pieces) == "Grüße, 世界!"
    client.generate(model=MODEL, prompt="hi", format=WEATHER, options={"num_predict": 3})
    assert agent.request.constraint is not None


def test_an_agents_loop(agent: Agent, client: ollama.Client) -> None:
    agent.says = call_text("weather", '{"city": "Bern"}')
    turns: list[Any] = [*HI]
    answer = client.chat(model=MODEL, messages=turns, tools=[weather])
    (call,) = answer.message.tool_calls or ()
    result = weather(**call.function.arguments)
    turns += [answer.message, {"role": "tool", "content": result, "tool_name": "weather"}]
    agent.says = "It is sunny."
    answer = client.chat(model=MODEL, messages=turns, tools=[weather])
    assert answer.message.content == "It is sunny."
    assert agent.prompt.endswith("tool weather: sunny in Bern\nassistant:")


def test_models(client: ollama.Client) -> None:
    (model,) = client.list().models
    assert model.model == f"{MODEL}:latest"
    assert client.show(model.model).capabilities == ["completion", "tools", "thinking"]
    assert [it.model for it in client.ps().models] == [model.model]
    with pytest.raises(ollama.ResponseError, match="other") as caught:
        client.chat(model="other", messages=HI)
    assert caught.value.status_code == 404
