"""A server whose model has tools and reasoning, and says what a test lets it say."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from jserve.core.request import Request
from tests.gateway.http.http_serving import END, Served, serving

# In the form of Qwen's: calls are JSON within <tool_call>, reasoning is within <think>.
TEMPLATE = (
    "{% if tools %}tools: {{ tools | tojson }}, called within <tool_call>{{ '\n' }}{% endif %}"
    "{% for m in messages %}{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}: "
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}{% for call in m.tool_calls or [] %}"
    "<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    "{% endif %}"
)
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
}


def call_text(name: str, arguments: str) -> str:
    """A call as the model writes it."""
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


class Agent:
    """A running server and the next answer of its model. Owned by one test at a time."""

    def __init__(self, served: Served) -> None:
        self.served = served
        self.url = served.url
        self.says = "ok"

    def reply(self, request: Request) -> Sequence[int]:
        return [*self.says.encode(), END]

    @property
    def prompt(self) -> str:
        """The prompt of the last request."""
        return bytes(self.request.prompt).decode()

    @property
    def request(self) -> Request:
        return self.served.engine.submitted[-1]


@contextmanager
def serving_agent(**settings: Any) -> Iterator[Agent]:
    """A server with `TEMPLATE`."""
    agents: list[Agent] = []

    def reply(request: Request) -> Sequence[int]:
        return agents[0].reply(request)

    with serving(reply=reply, chat_template=TEMPLATE, **settings) as served:
        agents.append(Agent(served))
        yield agents[0]
