"""instructor: typed answers by tools, by a schema, and by JSON in text."""

from typing import Any

import instructor
import openai
import pytest
from instructor import Mode
from instructor.core import InstructorRetryException
from weather import QUESTION, Report

ASK = [{"role": "user", "content": QUESTION}]


@pytest.mark.parametrize("mode", [Mode.TOOLS, Mode.TOOLS_STRICT, Mode.JSON_SCHEMA])
def test_bound(url: str, model: str, mode: Mode) -> None:
    client = _client(url, mode)
    answer = client.chat.completions.create(response_model=Report, **_asked(model))
    assert isinstance(answer, Report)


def test_json(url: str, model: str) -> None:
    """The schema is in the prompt alone: the answer is bound to be JSON, of no certain form."""
    client = _client(url, Mode.JSON)
    seen: list[Any] = []
    client.on("completion:response", seen.append)
    try:
        client.chat.completions.create(response_model=Report, max_retries=0, **_asked(model))
    except InstructorRetryException:
        assert seen[0].choices[0].message.content.lstrip().startswith("{")


def _client(url: str, mode: Mode) -> instructor.Instructor:
    server = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)
    return instructor.from_openai(server, mode=mode)


def _asked(model: str) -> dict[str, Any]:
    return {"model": model, "messages": ASK, "temperature": 0, "seed": 1, "max_tokens": 64}
