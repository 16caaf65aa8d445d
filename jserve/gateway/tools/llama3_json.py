"""Llama 3's calls: JSON objects of a name and parameters, separated by semicolons.

They are the whole answer, or follow `<|python_tag|>`. Llama 4's own template has the same objects
between `<|python_start|>` and `<|python_end|>`.
"""

from collections.abc import Sequence

from jserve.gateway.tools.call_parser import CallParser, Marked
from jserve.gateway.tools.format import Tool, WantedCalls, openai_call_id
from jserve.gateway.tools.grammar import Layout, call_grammar, json_call
from jserve.gateway.tools.json_calls import read_json_calls

_TAG, _START, _END = "<|python_tag|>", "<|python_start|>", "<|python_end|>"
_LAYOUT = Layout(separator="; ", prefix=_TAG, leads="{[")


class Llama3Json:
    """The format `llama3_json`."""

    name = "llama3_json"
    markers = (_TAG, _START, _END)

    def parser(self, tools: Sequence[Tool]) -> CallParser:
        marked = [Marked(_TAG, read_json_calls), Marked(_START, read_json_calls, (_END,))]
        return CallParser(tools, marked, leading=Marked("", read_json_calls))

    def grammar(self, wanted: WantedCalls) -> str | None:
        return call_grammar(wanted, _LAYOUT, json_call("parameters"))

    def call_id(self) -> str:
        return openai_call_id()
