"""A server whose model says what a test tells it to, and checks against the package's types."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import openai
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from jserve.core.request import Request
from tests.gateway.http.http_serving import END, MODEL, Served, serving

RESPONSES = "/v1/responses"
# Takes tools and reasoning in the form of Qwen 3, and shows everything that it is given.
TEMPLATE = (
    "{% if tools %}tools: {{ tools | tojson }}{{ '\\n' }}"
    '{# <tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call> #}'
    "{% endif %}{% if reasoning_effort %}effort: {{ reasoning_effort }}{{ '\\n' }}{% endif %}"
    "{% for m in messages %}{{ m.role }}: "
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}"
    "{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
WEATHER = {
    "type": "function",
    "name": "get_weather",
    "description": "Says what the weather is.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Köln"}}\n</tool_call>'
ARGUMENTS = '{"city": "Köln"}'

_EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


class Script:
    """What the model answers: the next of `texts`, or the last one again. Owned by one server."""

    def __init__(self, *texts: str) -> None:
        self.texts = list(texts)
        self.prompts: list[str] = []

    def __call__(self, request: Request) -> list[int]:
        self.prompts.append(bytes(token for token in request.prompt if token < END).decode())
        text = self.texts.pop(0) if len(self.texts) > 1 else self.texts[0]
        return [*text.encode(), END]


@contextmanager
def responding(*texts: str, **options: Any) -> Iterator[tuple[Served, openai.OpenAI, Script]]:
    """A server, the official client and the script of the model."""
    script = Script(*(texts or ("Hello!",)))
    with (
        serving(**{"reply": script, "chat_template": TEMPLATE} | options) as served,
        client_of(served) as client,
    ):
        yield served, client, script


def client_of(served: Served, key: str = "any") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key=key, max_retries=0)


def create(client: openai.OpenAI, given: Any = "hi", **fields: Any) -> Any:
    return client.responses.create(model=MODEL, input=given, **fields)


def check_event(event: Any) -> Any:
    """Validates an event as the package's type, which admits other fields but no wrong ones."""
    return _EVENTS.validate_python(event)


def raises(
    kind: type[openai.APIStatusError], call: Callable[..., Any], *args: Any, **fields: Any
) -> dict[str, Any]:
    """Calls, and returns the body of the error of that kind."""
    try:
        call(*args, **fields)
    except kind as error:
        return error.response.json()["error"]
    raise AssertionError(f"no {kind.__name__}")
