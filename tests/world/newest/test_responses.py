"""The official OpenAI client's Responses: texts, streams, kept responses, parsing, tools."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from weather import DESCRIPTION, PARAMETERS, QUESTION, Report, check_arguments, weather

GREEDY: dict[str, Any] = {"temperature": 0, "max_output_tokens": 48}
TOOL = {"type": "function", "name": "weather", "description": DESCRIPTION}
TOOL |= {"parameters": PARAMETERS, "strict": True}


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def test_text(client: openai.OpenAI, model: str) -> None:
    whole = client.responses.create(model=model, input=QUESTION, **GREEDY)
    assert whole.output_text
    assert whole.status in ("completed", "incomplete")
    stream = client.responses.create(model=model, input=QUESTION, stream=True, **GREEDY)
    events = list(stream)
    assert events[0].type == "response.created"
    assert events[-1].type == f"response.{whole.status}"
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text


def test_kept(client: openai.OpenAI, model: str) -> None:
    first = client.responses.create(model=model, input=QUESTION, **GREEDY)
    assert client.responses.retrieve(first.id).output_text == first.output_text
    second = client.responses.create(
        model=model, input="And tomorrow?", previous_response_id=first.id, **GREEDY
    )
    assert second.previous_response_id == first.id
    assert second.usage.input_tokens > first.usage.input_tokens
    client.responses.delete(first.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)


def test_parse(client: openai.OpenAI, model: str) -> None:
    answer = client.responses.parse(model=model, input=QUESTION, text_format=Report, **GREEDY)
    assert isinstance(answer.output_parsed, Report)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "weather"}])
def test_tools_streamed(client: openai.OpenAI, model: str, choice: Any) -> None:
    with client.responses.stream(
        model=model,
        input=QUESTION,
        tools=[TOOL],
        tool_choice=choice,
        parallel_tool_calls=False,
        **GREEDY,
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_response()
    assert "response.function_call_arguments.done" in kinds
    (call,) = [item for item in final.output if item.type == "function_call"]
    check_arguments(call.arguments)


def test_agent(client: openai.OpenAI, model: str) -> None:
    items: list[Any] = [{"role": "user", "content": QUESTION}]
    asked: dict[str, Any] = {"model": model, "tools": [TOOL], "parallel_tool_calls": False}
    first = client.responses.create(input=items, tool_choice="required", **asked, **GREEDY)
    items += first.output
    for call in first.output:
        if call.type == "function_call":
            result = weather(**json.loads(call.arguments))
            items.append(
                {"type": "function_call_output", "call_id": call.call_id, "output": result}
            )
    answer = client.responses.create(input=items, tool_choice="none", **asked, **GREEDY)
    assert answer.output_text
