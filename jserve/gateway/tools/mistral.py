"""Mistral's calls: `[TOOL_CALLS]` and a JSON array, or a name and arguments for each call.

The second form is `[TOOL_CALLS]name[ARGS]{...}`, of tokenizers since version 11; some versions have
`[CALL_ID]id` after the name.
"""

import re
from collections.abc import Sequence

from jserve.gateway.tools.call_parser import CallParser, Marked
from jserve.gateway.tools.format import Schema, Tool, WantedCalls, random_id
from jserve.gateway.tools.grammar import Lark, Layout, call_grammar, json_call
from jserve.gateway.tools.json_calls import read_json_calls
from jserve.gateway.tools.reading import NotACall, Reading, Steps
from jserve.gateway.tools.values import JSON, read_value

_CALLS, _ARGS, _ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
_ARRAY = Layout(whole=(f"{_CALLS}[", "]"), separator=", ", marker=_CALLS)
_NAMED = Layout(each=(_CALLS, ""), marker=_CALLS)
_NAME = re.compile(r"[^\[\]{}\s]*")


class Mistral:
    """The format `mistral`."""

    name = "mistral"
    markers = (_CALLS, _ARGS, _ID)

    def parser(self, tools: Sequence[Tool]) -> CallParser:
        return CallParser(tools, [Marked(_CALLS, _read_calls)])

    def grammar(self, wanted: WantedCalls) -> str | None:
        if _ARGS in wanted.special:
            return call_grammar(wanted, _NAMED, _named_call)
        return call_grammar(wanted, _ARRAY, json_call())

    def call_id(self) -> str:
        return random_id(9)  # the template refuses any other length


def _named_call(lark: Lark, tool: Tool, schema: Schema) -> str:
    return f"{lark.literal(tool.name + _ARGS)} {lark.schema(schema)}"


def _read_calls(reading: Reading) -> Steps[None]:
    yield from reading.space()
    if (yield from reading.peek()) in ("[", "{"):
        yield from read_json_calls(reading)
        return
    name = yield from reading.word(_NAME)
    if name not in reading.tools:
        raise NotACall
    if (yield from reading.take(_ID)):
        yield from reading.word(_NAME)
    yield from reading.take(_ARGS)
    yield from reading.space()
    if (yield from reading.peek()) != "{":
        raise NotACall
    reading.begin(name)
    yield from read_value(reading, JSON, reading.arguments)
