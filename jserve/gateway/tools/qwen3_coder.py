"""Qwen3-Coder's calls: `<tool_call>`, `<function=name>`, a `<parameter=key>` for each argument.

A value stands between line ends and is JSON, but for strings, which are written as they are: the
tool's schema says which it is.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jserve.gateway.tools.call_parser import CallParser, Marked
from jserve.gateway.tools.format import Schema, Tool, WantedCalls, openai_call_id
from jserve.gateway.tools.grammar import TEXT, Lark, Layout, call_grammar
from jserve.gateway.tools.properties import (
    ANNOTATIONS,
    check_keywords,
    one_of_values,
    refuse,
    write_properties,
)
from jserve.gateway.tools.reading import NotACall, Reading, Steps
from jserve.gateway.tools.values import json_escaped

_OPENING, _CLOSING = "<tool_call>", "</tool_call>"
_FUNCTION, _FUNCTION_END = "<function=", "</function>"
_PARAMETER, _PARAMETER_END = "<parameter=", "</parameter>"
_LAYOUT = Layout(each=(f"{_OPENING}\n", f"\n{_CLOSING}"), separator="\n", marker=_OPENING)
_VALUE_END = f"\n{_PARAMETER_END}"
_NAME = re.compile(r"[^<>\n]*")
_JSON_TYPES = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}
_PYTHON_WORDS = {"True": "true", "False": "false", "None": "null"}


class Qwen3Coder:
    """The format `qwen3_coder`."""

    name = "qwen3_coder"
    markers = (_OPENING, _CLOSING)

    def parser(self, tools: Sequence[Tool]) -> CallParser:
        properties = {tool.name: tool.properties() for tool in tools}

        def read_function(reading: Reading) -> Steps[None]:
            yield from _read_function(reading, properties)

        def read_tagged(reading: Reading) -> Steps[None]:
            yield from reading.space()
            yield from reading.expect(_FUNCTION)
            yield from read_function(reading)

        # Models forget the outer tag, and put several functions into one.
        closings = (_CLOSING,)
        return CallParser(
            tools,
            [Marked(_OPENING, read_tagged, closings), Marked(_FUNCTION, read_function, closings)],
        )

    def grammar(self, wanted: WantedCalls) -> str | None:
        return call_grammar(wanted, _LAYOUT, _write_call)

    def call_id(self) -> str:
        return openai_call_id()


def _read_function(reading: Reading, properties: Mapping[str, Mapping[str, Schema]]) -> Steps[None]:
    name = (yield from reading.word(_NAME)).strip()
    if name not in reading.tools:
        raise NotACall
    yield from reading.expect(">")
    reading.begin(name)
    reading.arguments("{")
    keys: set[str] = set()
    while True:
        yield from reading.space()
        if (yield from reading.take(_FUNCTION_END)):
            break
        yield from reading.expect(_PARAMETER)
        key = (yield from reading.word(_NAME)).strip()
        yield from reading.expect(">")
        if not key or key in keys:
            raise NotACall
        reading.arguments((", " if keys else "") + json.dumps(key, ensure_ascii=False) + ": ")
        keys.add(key)
        yield from _read_parameter(reading, _types(properties[name].get(key, {})))
    reading.arguments("}")


def _read_parameter(reading: Reading, types: frozenset[str]) -> Steps[None]:
    yield from reading.take("\r\n", "\n")
    closings = (_VALUE_END, _PARAMETER_END)
    if types == {"string"}:
        reading.arguments('"')
        closing = yield from reading.until(
            lambda text: reading.arguments(json_escaped(text)), *closings
        )
        if not closing:
            raise NotACall
        reading.arguments('"')
        return
    pieces: list[str] = []
    if not (yield from reading.until(pieces.append, *closings)):
        raise NotACall
    reading.arguments(_value("".join(pieces), types))


def _types(schema: Schema) -> frozenset[str]:
    """The JSON types that a schema names; none if it leaves them open."""
    options = schema.get("anyOf", schema.get("oneOf"))
    if isinstance(options, list) and options:
        named = [_types(one) if isinstance(one, Mapping) else frozenset[str]() for one in options]
        return frozenset[str]().union(*named) if all(named) else frozenset()
    kinds = schema.get("type")
    if isinstance(kinds, str):
        return frozenset([kinds])
    if isinstance(kinds, list):
        return frozenset(kind for kind in kinds if isinstance(kind, str))
    values = schema.get("enum")
    if isinstance(values, list) and values:
        return frozenset(_JSON_TYPES.get(type(value), "object") for value in values)
    return frozenset()


def _value(text: str, types: frozenset[str]) -> str:
    """Returns the JSON of a value: what it says as JSON, if its schema allows that, or the text."""
    stripped = text.strip()
    stripped = _PYTHON_WORDS.get(stripped, stripped)
    try:
        value = json.loads(stripped, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return json.dumps(text, ensure_ascii=False)
    if not types or _type_of(value) in types or (type(value) is int and "number" in types):
        return stripped
    return json.dumps(text, ensure_ascii=False) if "string" in types else stripped


def _type_of(value: Any) -> str:
    if isinstance(value, list):
        return "array"
    return _JSON_TYPES.get(type(value), "object")


def _no_constant(name: str) -> None:
    raise ValueError(name)  # NaN and Infinity are no JSON


_STRING = ANNOTATIONS | {"type", "enum", "const"}


def _write_call(lark: Lark, tool: Tool, schema: Schema) -> str:
    def write(key: str, value: Schema) -> str:
        if not _NAME.fullmatch(key) or not key.strip():
            raise refuse(tool.name, f"the argument {key!r}, which no tag can hold")
        head = lark.literal(f"{_PARAMETER}{key}>\n")
        if _types(value) != {"string"}:
            # A string among other types is written as JSON, which is read back as a string.
            return f'{head} {lark.schema(value)} {lark.literal(_VALUE_END)} "\\n"'
        check_keywords(tool.name, value, _STRING)
        values = one_of_values(tool.name, value)
        if values is not None:
            one = lark.any_of(lark.literal(f"{text}{_VALUE_END}") for text in values)
        else:
            one = _any_text(lark)
        return f'{head} {one} "\\n"'

    def free() -> str:
        key = lark.terminal("/[a-zA-Z_][a-zA-Z0-9_]*/")
        return f'{lark.literal(_PARAMETER)} {key} ">\\n" {_any_text(lark)} "\\n"'

    if not _NAME.fullmatch(tool.name):
        raise refuse(tool.name, "its name, which no tag can hold")
    arguments = write_properties(lark, tool.name, schema, write, free, separator="")
    head = lark.literal(f"{_FUNCTION}{tool.name}>\n")
    return f"{head} {arguments} {lark.literal(_FUNCTION_END)}"


def _any_text(lark: Lark) -> str:
    """Adds a rule for a value that ends where the first closing tag does, on a new line or not."""
    return lark.rule(f"{lark.terminal(TEXT)} {lark.literal(_PARAMETER_END)}", options="[lazy]")
