"""The official OpenAI client: chat, structured output, tools, and an agent's loop."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletion
from weather import PARAMETERS, QUESTION, TOOL, Report, check_arguments, weather

ASK = [{"role": "user", "content": QUESTION}]
GREEDY: dict[str, Any] = {"temperature": 0, "seed": 1, "max_tokens": 48}
NAMED = {"type": "function", "function": {"name": "weather"}}


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def test_chat(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(model=model, messages=ASK, **GREEDY)
    assert answer.choices[0].message.content
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    chunks = list(
        client.chat.completions.create(
            model=model, messages=ASK, stream=True, stream_options={"include_usage": True}, **GREEDY
        )
    )
    text = "".join(it.choices[0].delta.content or "" for it in chunks if it.choices)
    assert text == answer.choices[0].message.content
    assert chunks[-1].usage == answer.usage or chunks[-1].usage.total_tokens


def test_choices_and_logprobs(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.create(
        model=model, messages=ASK, n=3, logprobs=True, top_logprobs=2, max_tokens=4, seed=1
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    for choice in answer.choices:
        assert choice.logprobs.content
        assert all(len(token.top_logprobs) == 2 for token in choice.logprobs.content)
        assert all(token.logprob <= 0 for token in choice.logprobs.content)


def test_completions(client: openai.OpenAI, model: str) -> None:
    answer = client.completions.create(model=model, prompt=["One, two,", "A, B,"], max_tokens=4)
    assert [choice.index for choice in answer.choices] == [0, 1]


def test_parse(client: openai.OpenAI, model: str) -> None:
    answer = client.chat.completions.parse(
        model=model, messages=ASK, response_format=Report, **GREEDY
    )
    assert isinstance(answer.choices[0].message.parsed, Report)


def test_parse_streamed(client: openai.OpenAI, model: str) -> None:
    with client.chat.completions.stream(
        model=model, messages=ASK, response_format=Report, **GREEDY
    ) as stream:
        kinds = {event.type for event in stream}
        answer = stream.get_final_completion()
    assert "content.done" in kinds
    assert isinstance(answer.choices[0].message.parsed, Report)


def test_json_schema(client: openai.OpenAI, model: str) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "w", "schema": PARAMETERS}}
    answer = client.chat.completions.create(
        model=model, messages=ASK, response_format=form, **GREEDY
    )
    check_arguments(answer.choices[0].message.content)


@pytest.mark.parametrize(("choice", "reason"), [("required", "tool_calls"), (NAMED, "stop")])
def test_tools(client: openai.OpenAI, model: str, choice: Any, reason: str) -> None:
    asked = {
        **{"model": model, "messages": ASK, "tools": [TOOL], "tool_choice": choice},
        **{"parallel_tool_calls": False, **GREEDY},
    }
    answer = client.chat.completions.create(**asked)
    (call,) = answer.choices[0].message.tool_calls
    assert answer.choices[0].finish_reason == reason
    assert call.function.name == "weather"
    check_arguments(call.function.arguments)
    with client.chat.completions.stream(**asked) as stream:
        events = [event.type for event in stream]
        streamed = stream.get_final_completion()
    assert "tool_calls.function.arguments.done" in events
    (again,) = streamed.choices[0].message.tool_calls
    assert again.function.name == "weather"
    assert again.function.arguments == call.function.arguments
    assert streamed.choices[0].finish_reason == reason


def test_tools_if_the_model_likes(client: openai.OpenAI, model: str) -> None:
    asked: dict[str, Any] = {"model": model, "messages": ASK, "tools": [TOOL], **GREEDY}
    answer = client.chat.completions.create(**asked)
    message = answer.choices[0].message
    assert message.content or message.tool_calls
    chunks = list(client.chat.completions.create(stream=True, **asked))
    text = "".join(it.choices[0].delta.content or "" for it in chunks if it.choices)
    assert text == (message.content or "")


def test_parsed_arguments(client: openai.OpenAI, model: str) -> None:
    """A tool made of a pydantic class, whose arguments come back as one."""
    answer = client.chat.completions.parse(
        model=model,
        messages=ASK,
        tools=[openai.pydantic_function_tool(Report)],
        tool_choice="required",
        parallel_tool_calls=False,
        **GREEDY,
    )
    (call,) = answer.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Report)


def test_agent(client: openai.OpenAI, model: str) -> None:
    """Calls the tool by a bound call, hands in the result, and gets an answer."""
    messages: list[Any] = list(ASK)

    def step(choice: str) -> ChatCompletion:
        return client.chat.completions.create(
            model=model,
            messages=messages,
            tools=[TOOL],
            tool_choice=choice,
            parallel_tool_calls=False,
            **GREEDY,
        )

    message = step("required").choices[0].message
    messages.append(message)
    for call in message.tool_calls:
        result = weather(**json.loads(call.function.arguments))
        messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    answer = step("none").choices[0].message
    assert answer.content
    assert not answer.tool_calls


def test_reasoning_and_calls(scripted: Any) -> None:
    with (
        openai.OpenAI(base_url=f"{scripted.url}/v1", api_key=scripted.key, max_retries=0) as client,
        client.chat.completions.stream(
            model=scripted.model, messages=ASK, tools=[TOOL], max_tokens=300
        ) as stream,
    ):
        message = stream.get_final_completion().choices[0].message
    assert message.reasoning_content == "I don't know."
    assert message.content.strip() == "Let me see."
    check_arguments(message.tool_calls[0].function.arguments)


def test_errors(client: openai.OpenAI, model: str) -> None:
    with pytest.raises(openai.BadRequestError) as too_long:
        client.completions.create(model=model, prompt="word " * 20_000)
    assert too_long.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="another", messages=ASK)


async def _streamed(url: str, model: str) -> list[str]:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as client:
        stream = await client.chat.completions.create(
            model=model, messages=ASK, stream=True, **GREEDY
        )
        return [it.choices[0].delta.content or "" async for it in stream if it.choices]


def test_async(url: str, model: str) -> None:
    assert "".join(asyncio.run(_streamed(url, model)))
