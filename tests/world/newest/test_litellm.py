"""litellm: chat, structured output, tools, its errors, and an agent's loop."""

from typing import Any

import litellm
import pytest
from weather import QUESTION, TOOL, Report, check_arguments, weather

ASK = [{"role": "user", "content": QUESTION}]
ONE_CALL = {"parallel_tool_calls": False}


@pytest.fixture(scope="module")
def asked(url: str, model: str) -> dict[str, Any]:
    return {
        **{"model": f"openai/{model}", "api_base": f"{url}/v1", "api_key": "unused"},
        **{"temperature": 0, "seed": 1, "max_tokens": 48, "num_retries": 0},
    }


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
def test_chat(asked: dict[str, Any], model: str, provider: str) -> None:
    asked = {**asked, "model": f"{provider}/{model}", "messages": ASK}
    whole = litellm.completion(**asked)
    assert whole.choices[0].message.content
    parts = litellm.completion(stream=True, **asked)
    text = "".join(part.choices[0].delta.content or "" for part in parts)
    assert text == whole.choices[0].message.content


def test_response_format(asked: dict[str, Any]) -> None:
    answer = litellm.completion(messages=ASK, response_format=Report, **asked)
    Report.model_validate_json(answer.choices[0].message.content)


def test_agent(asked: dict[str, Any]) -> None:
    messages: list[Any] = list(ASK)
    first = litellm.completion(
        messages=messages, tools=[TOOL], tool_choice="required", **ONE_CALL, **asked
    )
    message = first.choices[0].message
    messages.append(message)
    assert message.tool_calls
    for call in message.tool_calls:
        result = weather(**check_arguments(call.function.arguments))
        messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    answer = litellm.completion(messages=messages, tools=[TOOL], tool_choice="none", **asked)
    assert answer.choices[0].message.content


def test_tools_streamed(asked: dict[str, Any]) -> None:
    parts = litellm.completion(
        messages=ASK, tools=[TOOL], tool_choice="required", stream=True, **ONE_CALL, **asked
    )
    whole = litellm.stream_chunk_builder(list(parts), messages=ASK)
    (call, *_) = whole.choices[0].message.tool_calls
    check_arguments(call.function.arguments)


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm"])
def test_too_long(asked: dict[str, Any], model: str, provider: str) -> None:
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(
            **{**asked, "model": f"{provider}/{model}"},
            messages=[{"role": "user", "content": "word " * 20_000}],
        )


def test_responses(asked: dict[str, Any], model: str) -> None:
    answer = litellm.responses(
        model=f"openai/{model}",
        input=QUESTION,
        api_base=asked["api_base"],
        api_key="unused",
        temperature=0,
        max_output_tokens=16,
    )
    assert answer.output
