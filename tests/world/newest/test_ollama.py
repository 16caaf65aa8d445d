"""The official Ollama client: models, generation, chat, formats, and an agent's loop."""

from typing import Any

import ollama
import pytest
from weather import PARAMETERS, QUESTION, TOOL, Report, check_arguments, weather

ASK = [{"role": "user", "content": QUESTION}]
OPTIONS: dict[str, Any] = {"temperature": 0, "seed": 1, "num_predict": 48}


@pytest.fixture(scope="module")
def client(url: str) -> ollama.Client:
    return ollama.Client(host=url)


def test_models(client: ollama.Client, model: str) -> None:
    assert [found.model for found in client.list().models]
    assert client.show(model).details


def test_generate(client: ollama.Client, model: str) -> None:
    whole = client.generate(model=model, prompt=QUESTION, options=OPTIONS)
    assert whole.done
    parts = list(client.generate(model=model, prompt=QUESTION, options=OPTIONS, stream=True))
    assert "".join(part.response for part in parts) == whole.response
    assert parts[-1].eval_count == whole.eval_count


def test_chat(client: ollama.Client, model: str) -> None:
    whole = client.chat(model=model, messages=ASK, options=OPTIONS)
    assert whole.message.content
    parts = list(client.chat(model=model, messages=ASK, options=OPTIONS, stream=True))
    assert "".join(part.message.content or "" for part in parts) == whole.message.content


def test_format(client: ollama.Client, model: str) -> None:
    answer = client.chat(
        model=model, messages=ASK, options=OPTIONS, format=Report.model_json_schema()
    )
    Report.model_validate_json(answer.message.content)


def test_agent(client: ollama.Client, model: str) -> None:
    """The API has no `tool_choice`, so the arguments of the call are bound by `format`."""
    asked: dict[str, Any] = {"model": model, "options": OPTIONS}
    plan = client.chat(messages=ASK, format=PARAMETERS, **asked)
    arguments = check_arguments(plan.message.content)
    call = {"function": {"name": "weather", "arguments": arguments}}
    messages = [
        *ASK,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_name": "weather", "content": weather(**arguments)},
    ]
    assert client.chat(messages=messages, **asked).message.content


def test_tools_if_the_model_likes(client: ollama.Client, model: str) -> None:
    message = client.chat(model=model, messages=ASK, tools=[TOOL], options=OPTIONS).message
    assert message.content or message.tool_calls


def test_thinking_and_calls(scripted: Any) -> None:
    def weather(city: str, days: int) -> str:
        """Tells the weather.

        Args:
            city: A city.
            days: Number of days.
        """
        return f"{city} {days}"

    client = ollama.Client(host=scripted.url, headers={"Authorization": f"Bearer {scripted.key}"})
    asked: dict[str, Any] = {"model": scripted.model, "tools": [weather], "think": True}
    answer = client.chat(messages=ASK, **asked).message
    assert answer.thinking == "I don't know."
    assert answer.content.strip() == "Let me see."
    (call,) = answer.tool_calls
    check_arguments(dict(call.function.arguments))
    result = {"role": "tool", "tool_name": "weather", "content": weather(**call.function.arguments)}
    assert client.chat(messages=[*ASK, answer, result], **asked).message.content
    parts = list(client.chat(messages=ASK, stream=True, **asked))
    assert "".join(part.message.thinking or "" for part in parts) == answer.thinking
    assert [call for part in parts for call in part.message.tool_calls or ()] == [call]


def test_errors(client: ollama.Client) -> None:
    with pytest.raises(ollama.ResponseError) as error:
        client.chat(model="another", messages=ASK)
    assert error.value.status_code == 404
