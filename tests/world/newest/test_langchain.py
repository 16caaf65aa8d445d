"""langchain-openai: chat models, structured output by its three methods, tools, an agent's loop."""

from typing import Any

import openai
import pytest
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from weather import QUESTION, TOOL, Report, check_arguments, weather


@pytest.fixture
def asked(url: str, model: str) -> dict[str, Any]:
    return {
        **{"base_url": f"{url}/v1", "api_key": "unused", "model": model, "max_retries": 0},
        **{"temperature": 0, "max_completion_tokens": 64},
    }


@pytest.fixture
def chat(asked: dict[str, Any]) -> ChatOpenAI:
    return ChatOpenAI(seed=1, **asked)


def test_chat(chat: ChatOpenAI) -> None:
    whole = chat.invoke(QUESTION)
    assert whole.content
    assert whole.usage_metadata["total_tokens"] > 0
    assert "".join(chunk.content for chunk in chat.stream(QUESTION)) == whole.content
    assert len(chat.batch([QUESTION, "Name a fruit."])) == 2


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(chat: ChatOpenAI, method: str) -> None:
    answer = chat.with_structured_output(Report, method=method).invoke(QUESTION)
    assert isinstance(answer, Report)


def test_json_mode(chat: ChatOpenAI) -> None:
    """The schema is no part of the request: a small model's JSON may have any form or length."""
    bound = chat.with_structured_output(None, method="json_mode", include_raw=True)
    try:
        answer = bound.invoke("Answer in JSON: name a city.")
        assert isinstance(answer["parsed"], dict)
    except openai.LengthFinishReasonError as error:
        text = error.completion.choices[0].message.content
        if not text.startswith("{"):
            raise


def test_agent(chat: ChatOpenAI) -> None:
    messages: list[Any] = [HumanMessage(QUESTION)]
    first = chat.bind_tools([TOOL], tool_choice="required", parallel_tool_calls=False).invoke(
        messages
    )
    messages.append(first)
    assert first.tool_calls
    for call in first.tool_calls:
        check_arguments(call["args"])
        messages.append(ToolMessage(weather(**call["args"]), tool_call_id=call["id"]))
    answer = chat.bind_tools([TOOL], tool_choice="none").invoke(messages)
    assert answer.content


def test_tools_streamed(chat: ChatOpenAI) -> None:
    bound = chat.bind_tools([Report], tool_choice="Report")
    whole = None
    for chunk in bound.stream(QUESTION):
        whole = chunk if whole is None else whole + chunk
    assert [call["name"] for call in whole.tool_calls] == ["Report"]
    Report.model_validate(whole.tool_calls[0]["args"])


def test_responses(asked: dict[str, Any]) -> None:
    answer = ChatOpenAI(use_responses_api=True, **asked).invoke(QUESTION)
    assert answer.text
