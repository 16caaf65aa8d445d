"""Calls of models without a format of their own: the whole answer is a JSON object or an array.

Each call has a name and arguments (or parameters).
"""

from collections.abc import Sequence

from jserve.gateway.tools.call_parser import CallParser, Marked
from jserve.gateway.tools.format import Tool, WantedCalls, openai_call_id
from jserve.gateway.tools.grammar import Layout, call_grammar, json_call
from jserve.gateway.tools.json_calls import read_json_calls

_ONE = Layout(leads="{[")
_SEVERAL = Layout(whole=("[", "]"), separator=", ", leads="{[")


class GenericJson:
    """The format `generic_json`."""

    name = "generic_json"
    markers: tuple[str, ...] = ()

    def parser(self, tools: Sequence[Tool]) -> CallParser:
        return CallParser(tools, [], leading=Marked("", read_json_calls))

    def grammar(self, wanted: WantedCalls) -> str | None:
        return call_grammar(wanted, _SEVERAL if wanted.several else _ONE, json_call())

    def call_id(self) -> str:
        return openai_call_id()
