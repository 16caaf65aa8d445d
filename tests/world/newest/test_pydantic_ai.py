"""pydantic-ai: typed output in its three modes, tools, and its own agent's loop."""

from typing import Annotated, Any, Literal

import pytest
from pydantic import Field
from pydantic_ai import Agent, NativeOutput, PromptedOutput, ToolOutput, capture_run_messages
from pydantic_ai.capabilities import AbstractCapability
from pydantic_ai.exceptions import OutputTokenLimitExceeded, UnexpectedModelBehavior
from pydantic_ai.messages import TextPart
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.settings import ModelSettings
from pydantic_ai.usage import UsageLimits
from weather import QUESTION, Report, check_arguments
from weather import weather as tell_weather

Days = Annotated[int, Field(ge=1, le=9)]
SETTINGS = ModelSettings(temperature=0, seed=1, max_tokens=64)


@pytest.fixture(params=["chat", "responses"])
def chat_model(request: pytest.FixtureRequest, url: str, model: str) -> Any:
    provider = OpenAIProvider(base_url=f"{url}/v1", api_key="unused")
    kind = OpenAIChatModel if request.param == "chat" else OpenAIResponsesModel
    return kind(model, provider=provider, settings=SETTINGS)


def test_text(chat_model: Any) -> None:
    assert Agent(chat_model).run_sync(QUESTION).output


@pytest.mark.parametrize("mode", [ToolOutput, NativeOutput])
def test_typed_output(chat_model: Any, mode: Any) -> None:
    answer = Agent(chat_model, output_type=mode(Report)).run_sync(QUESTION)
    assert isinstance(answer.output, Report)


def test_prompted_output(chat_model: Any) -> None:
    """The schema is in the prompt alone: the model's JSON may be of any form or length."""
    agent = Agent(chat_model, output_type=PromptedOutput(Report), retries=0)
    with capture_run_messages() as messages:
        try:
            assert isinstance(agent.run_sync(QUESTION).output, Report)
        except (OutputTokenLimitExceeded, UnexpectedModelBehavior):
            (part,) = [it for it in messages[-1].parts if isinstance(it, TextPart)]
            assert part.content.startswith("{")


class CallsFirst(AbstractCapability[Any]):
    """The first step must call a tool; later ones must not."""

    def get_model_settings(self) -> Any:
        return lambda context: {"tool_choice": "required" if context.run_step == 1 else "none"}


@pytest.mark.parametrize("output", [str, ToolOutput(Report)])
def test_agent(chat_model: Any, output: Any) -> None:
    called: list[dict[str, Any]] = []

    async def weather(city: Literal["Paris", "Rome", "Oslo"], days: Days) -> str:
        """Tells the weather of a city."""
        called.append(check_arguments({"city": city, "days": days}))
        return tell_weather(city, days)

    settings = ModelSettings(parallel_tool_calls=False)
    agent = Agent(
        chat_model,
        output_type=output,
        tools=[weather],
        capabilities=[CallsFirst()],
        model_settings=settings,
    )
    answer = agent.run_sync(QUESTION, usage_limits=UsageLimits(request_limit=4))
    assert len(called) == 1
    assert isinstance(answer.output, str if output is str else Report)
    assert answer.output
