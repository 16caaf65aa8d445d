"""pydantic-ai: typed output in its three modes, tools, and its own agent's loop."""

from typing import Any

import pytest
from pydantic_ai import Agent, NativeOutput, PromptedOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.settings import ModelSettings
from weather import QUESTION, Report
from weather import weather as tell_weather

SETTINGS = ModelSettings(temperature=0, seed=1, max_tokens=64)


@pytest.fixture(params=["chat", "responses"])
def chat_model(request: pytest.FixtureRequest, url: str, model: str) -> Any:
    provider = OpenAIProvider(base_url=f"{url}/v1", api_key="unused")
    kind = OpenAIChatModel if request.param == "chat" else OpenAIResponsesModel
    return kind(model, provider=provider, settings=SETTINGS)


def test_text(chat_model: Any) -> None:
    assert Agent(chat_model).run_sync(QUESTION).output


@pytest.mark.parametrize("mode", [ToolOutput, NativeOutput, PromptedOutput])
def test_typed_output(chat_model: Any, mode: Any) -> None:
    """`PromptedOutput` asks for any JSON object and checks it, so its output is left free."""
    output = dict[str, Any] if mode is PromptedOutput else Report
    answer = Agent(chat_model, output_type=mode(output), retries=2).run_sync(QUESTION)
    assert isinstance(answer.output, dict if mode is PromptedOutput else Report)


def test_agent(chat_model: Any) -> None:
    """The tool is called by force in the first step; the typed output is a call, too."""
    called: list[tuple[str, int]] = []

    async def weather(city: str, days: int) -> str:
        """Tells the weather of a city."""
        called.append((city, days))
        return tell_weather(city, days)

    agent = Agent(chat_model, output_type=ToolOutput(Report), tools=[weather], retries=2)
    answer = agent.run_sync(QUESTION)
    assert isinstance(answer.output, Report)
