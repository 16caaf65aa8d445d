"""Options of oneOf that exclude each other: for them it says the same as anyOf."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any
from urllib.parse import unquote

from jserve.grammar.pointers import resolve

_ALL = frozenset({"null", "boolean", "number", "string", "array", "object"})
_MAX_OPTIONS = 200  # pairs of them are compared
_MAX_DEPTH = 8


def are_disjoint(options: Sequence[Any], root: Any) -> bool:
    """Whether no value is valid for two of `options`; False also where that is hard to tell.

    They are as the client wrote them; `root` is what they refer to.
    """
    if len(options) > _MAX_OPTIONS:
        return False
    return all(_excludes(a, b, root, 0) for a, b in combinations(options, 2))


def _excludes(a: Any, b: Any, root: Any, depth: int) -> bool:
    if depth > _MAX_DEPTH:
        return False
    a, b = _target(a, root), _target(b, root)
    if a is False or b is False:
        return True
    if not isinstance(a, dict) or not isinstance(b, dict):
        return False
    common = _types(a, root, 0) & _types(b, root, 0)
    if not common:
        return True
    values_a, values_b = _values(a), _values(b)
    if values_a is not None and values_b is not None:
        return not any(_equal(x, y) for x in values_a for y in values_b)
    if common != {"object"}:
        return False
    return any(
        _excludes(_property(a, name), _property(b, name), root, depth + 1)
        for name in _required(a) & _required(b)
    )


def _target(schema: Any, root: Any) -> Any:
    """Follows references that stand alone, or beside what can only narrow them."""
    for _ in range(_MAX_DEPTH):
        reference = schema.get("$ref") if isinstance(schema, dict) else None
        if not isinstance(reference, str) or not reference.startswith("#"):
            return schema
        schema = resolve(root, unquote(reference[1:]))
    return True


def _types(schema: Any, root: Any, depth: int) -> frozenset[str]:
    schema = _target(schema, root)
    if not isinstance(schema, dict) or depth > _MAX_DEPTH:
        return _ALL
    types = _ALL
    if (given := schema.get("type")) is not None:
        names = [given] if isinstance(given, str) else given if isinstance(given, list) else _ALL
        types &= {"number" if name == "integer" else str(name) for name in names}
    if (values := _values(schema)) is not None:
        types &= {_type(value) for value in values}
    for name in ("anyOf", "oneOf"):
        if isinstance(options := schema.get(name), list):
            types &= frozenset[str]().union(*(_types(it, root, depth + 1) for it in options))
    return types


def _values(schema: dict[str, Any]) -> list[Any] | None:
    if "const" in schema:
        return [schema["const"]]
    values = schema.get("enum")
    return values if isinstance(values, list) and len(values) <= _MAX_OPTIONS else None


def _required(schema: dict[str, Any]) -> set[str]:
    names = schema.get("required")
    return {it for it in names if isinstance(it, str)} if isinstance(names, list) else set()


def _property(schema: dict[str, Any], name: str) -> Any:
    properties = schema.get("properties")
    return properties.get(name, True) if isinstance(properties, dict) else True


def _type(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int() | float():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
        case _:
            return "object"


def _equal(a: Any, b: Any) -> bool:
    # In JSON 1 equals 1.0, and not true. Containers are taken to be equal: nobody asks.
    if _type(a) != _type(b):
        return False
    return a == b if not isinstance(a, list | dict) else True
