"""Hermes' calls: `<tool_call>`, a JSON object, `</tool_call>`. Qwen 2.5 and 3, SmolLM, and others.

SmolLM2 is prompted for one array of all calls between the tags; SmolLM3 writes as Qwen does.
"""

from collections.abc import Sequence

from jserve.gateway.tools.call_parser import CallParser, Marked
from jserve.gateway.tools.format import Tool, WantedCalls, openai_call_id
from jserve.gateway.tools.grammar import Layout, call_grammar, json_call
from jserve.gateway.tools.json_calls import read_json_calls

_OPENING, _CLOSING = "<tool_call>", "</tool_call>"
_LAYOUT = Layout(each=(f"{_OPENING}\n", f"\n{_CLOSING}"), separator="\n", marker=_OPENING)


class Hermes:
    """The format `hermes`."""

    name = "hermes"
    markers = (_OPENING, _CLOSING)

    def parser(self, tools: Sequence[Tool]) -> CallParser:
        return CallParser(tools, [Marked(_OPENING, read_json_calls, (_CLOSING,))])

    def grammar(self, wanted: WantedCalls) -> str | None:
        return call_grammar(wanted, _LAYOUT, json_call())

    def call_id(self) -> str:
        return openai_call_id()
