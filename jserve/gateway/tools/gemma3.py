"""Calls that Gemma 3 is prompted for: it has no format of its own.

They are a pythonic list or a JSON object as the whole answer, or lines of Python or JSON in a code
block: `tool_code`, `tool_call` or `json`. In `tool_code` a call may be wrapped in `print`.
"""

from collections.abc import Sequence

from jserve.gateway.tools.call_parser import CallParser, Marked
from jserve.gateway.tools.format import Tool, WantedCalls, openai_call_id
from jserve.gateway.tools.grammar import call_grammar
from jserve.gateway.tools.json_calls import read_json_array, read_json_calls
from jserve.gateway.tools.pythonic import LAYOUT, python_call, read_python_call, read_python_list
from jserve.gateway.tools.reading import Reading, Steps

_FENCE = "```"


class Gemma3:
    """The format `gemma3`."""

    name = "gemma3"
    markers: tuple[str, ...] = ()

    def parser(self, tools: Sequence[Tool]) -> CallParser:
        marked = [
            Marked(f"{_FENCE}tool_code", _read_lines, (_FENCE,)),
            Marked(f"{_FENCE}tool_call", _read_whole, (_FENCE,)),
            Marked(f"{_FENCE}json", _read_whole, (_FENCE,)),
        ]
        return CallParser(tools, marked, leading=Marked("", _read_whole))

    def grammar(self, wanted: WantedCalls) -> str | None:
        return call_grammar(wanted, LAYOUT, python_call)

    def call_id(self) -> str:
        return openai_call_id()


def _read_whole(reading: Reading) -> Steps[None]:
    """Reads JSON calls or a pythonic list."""
    yield from reading.space()
    if not (yield from reading.take("[")):
        yield from read_json_calls(reading)
        return
    yield from reading.space()
    if (yield from reading.peek()) == "{":
        yield from read_json_array(reading)
    else:
        yield from read_python_list(reading)


def _read_lines(reading: Reading) -> Steps[None]:
    """Reads a pythonic list, or calls one after another."""
    yield from reading.space()
    if (yield from reading.take("[")):
        yield from reading.space()
        yield from read_python_list(reading)
        return
    while True:
        printed = yield from reading.take("print(")
        yield from reading.take("default_api.")
        yield from read_python_call(reading)
        if printed:
            yield from reading.space()
            yield from reading.expect(")")
        reading.hold()
        yield from reading.space()
        if (yield from reading.peek()) in ("", "`"):
            return
