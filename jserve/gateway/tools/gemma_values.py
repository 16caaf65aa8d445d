"""The grammar of values as FunctionGemma and Gemma 4 write them, from a JSON schema."""

import json
import re
from collections.abc import Mapping
from typing import Any

from jserve.gateway.tools.format import Schema
from jserve.gateway.tools.grammar import TEXT, Lark
from jserve.gateway.tools.properties import (
    ANNOTATIONS,
    as_schema,
    check_keywords,
    one_of_values,
    refuse,
    write_properties,
)

_KEY = re.compile(r"[\w.-]+")
_BOUNDS = frozenset("minimum maximum exclusiveMinimum exclusiveMaximum multipleOf".split())
_KEYWORDS = {
    "string": ANNOTATIONS | {"type"},
    "integer": ANNOTATIONS | _BOUNDS | {"type"},
    "number": ANNOTATIONS | _BOUNDS | {"type"},
    "boolean": ANNOTATIONS | {"type"},
    "null": ANNOTATIONS | {"type"},
    "array": ANNOTATIONS | {"type", "items"},
    "object": ANNOTATIONS | {"type", "properties", "required", "additionalProperties"},
}


class GemmaValues:
    """Writes the rules for the arguments of one tool.

    Raises RequestError at what a schema says and these rules cannot.
    """

    def __init__(self, lark: Lark, tool: str, schema: Schema, quote: str) -> None:
        self._lark = lark
        self._tool = tool
        self._root = schema
        self._quote = quote
        self._by_reference: dict[str, str] = {}
        self._any = ""
        self._string_rule = ""

    def arguments(self) -> str:
        """Returns the expression of the object of all arguments."""
        return self._object(self._root)

    def _value(self, schema: Any) -> str:
        """Returns the expression of a value of this schema."""
        schema = as_schema(self._tool, schema)
        if "$ref" in schema:
            return self._reference(schema)
        values = one_of_values(self._tool, schema)
        if values is not None:
            return self._lark.any_of(self._lark.literal(self._text(one)) for one in values)
        options = schema.get("anyOf", schema.get("oneOf"))
        if isinstance(options, list):
            check_keywords(self._tool, schema, ANNOTATIONS | {"anyOf", "oneOf", "type"})
            return self._lark.any_of(self._value(one) for one in options)
        kind = schema.get("type")
        if isinstance(kind, list):
            return self._lark.any_of(self._value({**schema, "type": one}) for one in kind)
        if kind is None:
            check_keywords(self._tool, schema, ANNOTATIONS)
            return self._anything()
        if not isinstance(kind, str) or kind not in _KEYWORDS:
            raise refuse(self._tool, f"the type {kind!r}")
        check_keywords(self._tool, schema, _KEYWORDS[kind])
        if kind == "string":
            return self._string()
        if kind == "array":
            return self._array(schema)
        if kind == "object":
            return self._object(schema)
        return self._lark.schema(schema)

    def _reference(self, schema: Schema) -> str:
        check_keywords(self._tool, schema, ANNOTATIONS | {"$ref"})
        path = str(schema["$ref"])
        if path not in self._by_reference:
            rule = self._lark.name()
            self._by_reference[path] = rule  # before its body, which may refer to itself
            self._lark.rule(self._value(self._target(path)), name=rule)
        return self._by_reference[path]

    def _target(self, path: str) -> Schema:
        found: Any = self._root
        for step in path.removeprefix("#/").split("/"):
            found = found.get(step) if isinstance(found, Mapping) else None
        if not path.startswith("#/") or not isinstance(found, Mapping):
            raise refuse(self._tool, f"the reference {path!r}")
        return found

    def _string(self) -> str:
        if not self._string_rule:
            lark, quote = self._lark, self._lark.literal(self._quote)
            text = lark.terminal(TEXT)
            if lark.is_special(self._quote):
                self._string_rule = lark.rule(f"{quote} {text} {quote}")
            else:
                rest = lark.rule(f"{text} {quote}", options="[lazy]")
                self._string_rule = lark.rule(f"{quote} {rest}")
        return self._string_rule

    def _array(self, schema: Schema) -> str:
        one = self._lark.rule(self._value(schema.get("items", True)))
        return self._lark.rule(f'"[" ({one} ("," {one})*)? "]"')

    def _object(self, schema: Schema) -> str:
        def write(key: str, value: Schema) -> str:
            if not _KEY.fullmatch(key):
                raise refuse(self._tool, f"the argument {key!r}, which needs quotes")
            return f"{self._lark.literal(key + ':')} {self._value(value)}"

        rest = {**schema}
        for keyword in ("$defs", "definitions"):  # found from the root
            rest.pop(keyword, None)
        written = write_properties(
            self._lark, self._tool, rest, write, self._free_property, separator=","
        )
        return self._lark.rule(f'"{{" {written} "}}"')

    def _free_property(self) -> str:
        key = self._lark.terminal("/[a-zA-Z_][a-zA-Z0-9_]*/")
        return f'{key} ":" {self._anything()}'

    def _anything(self) -> str:
        if not self._any:
            self._any = self._lark.name()
            scalar = self._lark.schema({"type": ["number", "boolean", "null"]})
            body = [self._string(), scalar, self._array({}), self._object({})]
            self._lark.rule(" | ".join(body), name=self._any)
        return self._any

    def _text(self, value: Any) -> str:
        """Returns how the model writes a value."""
        if isinstance(value, str):
            return f"{self._quote}{value}{self._quote}"
        if isinstance(value, list):
            return f"[{','.join(map(self._text, value))}]"
        if isinstance(value, Mapping):
            return "{" + ",".join(f"{key}:{self._text(one)}" for key, one in value.items()) + "}"
        return json.dumps(value)
