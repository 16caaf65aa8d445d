"""The official Anthropic client: messages, streams, counted tokens, tools, an agent's loop."""

from collections.abc import Iterator
from typing import Any

import anthropic
import pytest
from weather import DESCRIPTION, PARAMETERS, QUESTION, check_arguments, weather

ASK = [{"role": "user", "content": QUESTION}]
GREEDY: dict[str, Any] = {"max_tokens": 48, "extra_body": {"temperature": 0}}
TOOL = {"name": "weather", "description": DESCRIPTION, "input_schema": PARAMETERS}


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=url, api_key="unused", max_retries=0) as client:
        yield client


def test_message(client: anthropic.Anthropic, model: str) -> None:
    answer = client.messages.create(model=model, messages=ASK, system="Be brief.", **GREEDY)
    assert answer.content[0].text
    assert answer.stop_reason in ("end_turn", "max_tokens")
    with client.messages.stream(model=model, messages=ASK, system="Be brief.", **GREEDY) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == answer.content[0].text
    assert final.stop_reason == answer.stop_reason
    assert final.usage.output_tokens == answer.usage.output_tokens


def test_stop_sequence(client: anthropic.Anthropic, model: str) -> None:
    answer = client.messages.create(model=model, messages=ASK, stop_sequences=["e"], **GREEDY)
    assert answer.stop_reason == "stop_sequence"
    assert answer.stop_sequence == "e"


def test_count_tokens(client: anthropic.Anthropic, model: str) -> None:
    counted = client.messages.count_tokens(model=model, messages=ASK)
    answer = client.messages.create(model=model, messages=ASK, max_tokens=1)
    usage = answer.usage
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}])
def test_tools(client: anthropic.Anthropic, model: str, choice: dict[str, Any]) -> None:
    choice = {**choice, "disable_parallel_tool_use": True}
    asked = {"model": model, "messages": ASK, "tools": [TOOL], "tool_choice": choice, **GREEDY}
    answer = client.messages.create(**asked)
    assert answer.stop_reason == "tool_use"
    (use,) = [block for block in answer.content if block.type == "tool_use"]
    check_arguments(use.input)
    with client.messages.stream(**asked) as stream:
        final = stream.get_final_message()
    (streamed,) = [block for block in final.content if block.type == "tool_use"]
    assert (streamed.name, streamed.input) == (use.name, use.input)


def test_agent(client: anthropic.Anthropic, model: str) -> None:
    messages: list[Any] = list(ASK)
    first = client.messages.create(
        model=model, messages=messages, tools=[TOOL], tool_choice={"type": "any"}, **GREEDY
    )
    messages.append({"role": "assistant", "content": first.content})
    results = [
        {"type": "tool_result", "tool_use_id": block.id, "content": weather(**block.input)}
        for block in first.content
        if block.type == "tool_use"
    ]
    assert results
    messages.append({"role": "user", "content": results})
    answer = client.messages.create(
        model=model, messages=messages, tools=[TOOL], tool_choice={"type": "none"}, **GREEDY
    )
    assert answer.content[0].type == "text"
    assert answer.content[0].text


def test_thinking(scripted: Any) -> None:
    """All kinds of blocks in a stream, which come back as blocks of the next turn."""
    asked: dict[str, Any] = {"model": scripted.model, "max_tokens": 300, "tools": [TOOL]}
    asked["thinking"] = {"type": "adaptive"}
    with anthropic.Anthropic(base_url=scripted.url, api_key=scripted.key, max_retries=0) as client:
        with client.messages.stream(messages=ASK, **asked) as stream:
            kinds = {event.type for event in stream}
            message = stream.get_final_message()
        assert {"thinking", "text", "input_json", "signature"} <= kinds
        assert [block.type for block in message.content] == ["thinking", "text", "tool_use"]
        assert message.stop_reason == "tool_use"
        use = message.content[-1]
        check_arguments(use.input)
        result = {"type": "tool_result", "tool_use_id": use.id, "content": weather(**use.input)}
        turns = [*ASK, message.to_param(), {"role": "user", "content": [result]}]
        assert client.messages.create(messages=turns, **asked).content
        with pytest.raises(anthropic.AuthenticationError):
            client.with_options(api_key="wrong").messages.create(messages=ASK, **asked)


def test_errors(client: anthropic.Anthropic, model: str) -> None:
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(model="another", messages=ASK, max_tokens=1)
    with pytest.raises(anthropic.BadRequestError):
        client.messages.create(model=model, messages=[], max_tokens=1)
