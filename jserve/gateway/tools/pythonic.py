"""Pythonic calls: `[f(a=1), g(b="x")]`, as Llama 3.2 and 4 write them.

They are the whole answer, or stand between `<|python_start|>` and `<|python_end|>`.
"""

import json
import re
from collections.abc import Sequence

from jserve.gateway.tools.call_parser import CallParser, Marked
from jserve.gateway.tools.format import Schema, Tool, WantedCalls, openai_call_id
from jserve.gateway.tools.grammar import Lark, Layout, call_grammar
from jserve.gateway.tools.properties import refuse, write_properties
from jserve.gateway.tools.reading import NotACall, Reading, Steps
from jserve.gateway.tools.values import PYTHON, read_value

_START, _END = "<|python_start|>", "<|python_end|>"
LAYOUT = Layout(whole=("[", "]"), separator=", ", prefix=_START, leads="[")
_NAME = re.compile(r"[^\W\d][\w.-]*")
_KEY = re.compile(r"[^\W\d]\w*")


class Pythonic:
    """The format `pythonic`."""

    name = "pythonic"
    markers = (_START, _END)

    def parser(self, tools: Sequence[Tool]) -> CallParser:
        marked = [Marked(_START, _read_calls, (_END,))]
        return CallParser(tools, marked, leading=Marked("", _read_calls))

    def grammar(self, wanted: WantedCalls) -> str | None:
        return call_grammar(wanted, LAYOUT, python_call)

    def call_id(self) -> str:
        return openai_call_id()


def python_call(lark: Lark, tool: Tool, schema: Schema) -> str:
    """Returns the expression of a call whose arguments are JSON, which the parser takes, too."""

    def write(key: str, value: Schema) -> str:
        if not _KEY.fullmatch(key):
            raise refuse(tool.name, f"the argument {key!r}, which is no Python name")
        return f"{lark.literal(key + '=')} {lark.schema(value)}"

    def free() -> str:
        return f'{lark.terminal("/[a-zA-Z_][a-zA-Z0-9_]*/")} "=" {lark.schema({})}'

    if not _NAME.fullmatch(tool.name):
        raise refuse(tool.name, "its name, which is no Python name")
    arguments = write_properties(lark, tool.name, schema, write, free, separator=", ")
    return f'{lark.literal(tool.name + "(")} {arguments} ")"'


def _read_calls(reading: Reading) -> Steps[None]:
    yield from reading.space()
    yield from reading.expect("[")
    yield from reading.space()
    yield from read_python_list(reading)


def read_python_list(reading: Reading) -> Steps[None]:
    """Reads the calls of a list, after its bracket and white space, and its end."""
    yield from read_python_call(reading)
    while True:
        reading.hold()
        yield from reading.space()
        comma = yield from reading.take(",")
        yield from reading.space()
        if (yield from reading.take("]")):
            reading.drop()
            return
        if not comma:
            raise NotACall
        yield from read_python_call(reading)


def read_python_call(reading: Reading) -> Steps[None]:
    """Reads `name(key=value, ...)`; the call begins with its first key, or where it ends."""
    name = yield from reading.word(_NAME)
    if name not in reading.tools:
        raise NotACall
    yield from reading.expect("(")
    keys: set[str] = set()
    while True:
        yield from reading.space()
        if (yield from reading.take(")")):
            break
        if keys:
            yield from reading.expect(",")
            yield from reading.space()
            if (yield from reading.take(")")):
                break
        key = yield from reading.word(_KEY)
        yield from reading.space()
        yield from reading.expect("=")
        if not key or key in keys:
            raise NotACall
        if not keys:
            reading.begin(name)
        reading.arguments(("{" if not keys else ", ") + json.dumps(key, ensure_ascii=False) + ": ")
        keys.add(key)
        yield from read_value(reading, PYTHON, reading.arguments)
    if not keys:
        reading.begin(name)
    reading.arguments("}" if keys else "{}")
