"""Grammars of arguments that are written one by one, in formats whose arguments are not JSON."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from jserve.core.errors import RequestError
from jserve.gateway.tools.format import Schema
from jserve.gateway.tools.grammar import Lark

# What a schema may say without binding what is written.
ANNOTATIONS = frozenset(
    "$comment $defs $id $schema default definitions deprecated description examples readOnly title "
    "writeOnly x-guidance".split()
)
_OBJECT = ANNOTATIONS | {"type", "properties", "required", "additionalProperties"}


def refuse(tool: str, what: str) -> RequestError:
    """Returns the error that this model's format cannot bind something in a tool's schema."""
    return RequestError(
        f"tools: this model's calls cannot be bound to the schema of {tool!r}: {what}; "
        "simplify it, or use tool_choice auto without strict",
        param="tools",
    )


def check_keywords(tool: str, schema: Schema, known: frozenset[str]) -> None:
    """Raises RequestError for the first keyword that isn't known."""
    for keyword in schema:
        if keyword not in known:
            raise refuse(tool, f"the keyword {keyword!r}")


def as_schema(tool: str, value: Any) -> Schema:
    """Returns a schema as an object: true stands for any value."""
    if value is True:
        return {}
    if not isinstance(value, Mapping):
        raise refuse(tool, f"the schema {json.dumps(value)[:60]}")
    return value


def one_of_values(tool: str, schema: Schema) -> list[Any] | None:
    """Returns the values that a schema lists, or None if it lists none."""
    if "const" in schema:
        return [schema["const"]]
    values = schema.get("enum")
    if values is not None and (not isinstance(values, list) or not values):
        raise refuse(tool, "its enum, which has no values")
    return values


def with_definitions(schema: Schema, root: Schema) -> Schema:
    """Returns a part of `root` which can be read alone: with root's definitions."""
    kept = {key: root[key] for key in ("$defs", "definitions", "x-guidance") if key in root}
    return {**kept, **schema} if kept else schema


def write_properties(
    lark: Lark,
    tool: str,
    schema: Schema,
    write: Callable[[str, Schema], str],
    free: Callable[[], str],
    *,
    separator: str,
) -> str:
    """Adds a rule for an object's properties in their order, those not required optional.

    `write` gives the expression of a property, `free` that of one of any name and value, for an
    object whose schema says nothing of its properties. Where it names some, others are never
    written. Returns the rule's name.
    """
    check_keywords(tool, schema, _OBJECT)
    properties: Any = schema.get("properties", {})
    required: Any = schema.get("required", [])
    if not properties and not required and schema.get("additionalProperties", True) is not False:
        one = lark.rule(free())
        return lark.rule(f"({one} ({lark.literal(separator)} {one})*)?")
    if not isinstance(properties, Mapping) or not isinstance(required, list):
        raise refuse(tool, "its properties or required")
    if not all(isinstance(key, str) for key in required):
        raise refuse(tool, "what it has as required")
    for key in required:
        if key not in properties:
            raise refuse(tool, f"the required argument {json.dumps(key)}, which has no schema")
    # Built from the last one: `first` is the rest if nothing is written yet, `later` if something.
    first = later = '""'
    for key in reversed(list(properties)):
        part = as_schema(tool, properties[key])
        one = lark.rule(write(key, with_definitions(part, schema)))
        with_first = f"{one} {later}"
        with_later = f"{lark.literal(separator)} {one} {later}"
        first, later = (
            lark.rule(with_first if key in required else f"{with_first} | {first}"),
            lark.rule(with_later if key in required else f"{with_later} | {later}"),
        )
    return first
