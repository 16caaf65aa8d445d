"""Recursion without an end in JSON Schema: finds it and cuts it off.

A grammar would follow it, and never accept: each document would need one more within it.
"""

from collections.abc import Collection, Mapping
from typing import Any

Schema = dict[str, Any] | bool

_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_MAPS = ("properties", "patternProperties")
_SINGLE = ("items", "additionalProperties")


def without_endless(
    schema: Schema, definitions: Mapping[str, Schema]
) -> tuple[Schema, dict[str, Schema]]:
    """Puts false where a schema refers to a definition that no finite document fulfils.

    `schema` is as `json_schema` writes it: references are `#/$defs/NAME`. Returns the schema, False
    if it is endless itself, and the definitions that are left.
    """
    finite: set[str] = set()
    left = dict(definitions)
    while found := {name for name, it in left.items() if _ends(it, finite)}:
        finite |= found
        left = {name: it for name, it in left.items() if name not in found}
    if not _ends(schema, finite):
        return False, {}
    if not left:
        return schema, dict(definitions)
    return _cut(schema, finite), {name: _cut(definitions[name], finite) for name in finite}


def _name(schema: dict[str, Any]) -> str:
    return schema["$ref"].rpartition("/")[2]


def _ends(schema: Schema, finite: Collection[str]) -> bool:
    """Whether a finite document may fulfil `schema`; True also where that is hard to tell."""
    if isinstance(schema, bool):
        return schema
    if "$ref" in schema and _name(schema) not in finite:
        return False
    if not all(_ends(it, finite) for it in schema.get("allOf", ())):
        return False
    for name in ("anyOf", "oneOf"):
        if name in schema and not any(_ends(it, finite) for it in schema[name]):
            return False
    given = schema.get("type")
    kinds = [given] if isinstance(given, str) else given
    if kinds is None or "const" in schema or "enum" in schema:
        return True
    return any(_type_ends(kind, schema, finite) for kind in kinds)


def _type_ends(kind: str, schema: dict[str, Any], finite: Collection[str]) -> bool:
    if kind == "object":
        properties = schema.get("properties", {})
        other = True if "patternProperties" in schema else schema.get("additionalProperties", True)
        needed = [properties.get(name, other) for name in schema.get("required", ())]
    elif kind == "array":
        least, prefix = schema.get("minItems", 0), schema.get("prefixItems", [])
        needed = prefix[:least]
        if least > len(prefix):
            needed = [*needed, schema.get("items", True)]
    else:
        return True
    return all(_ends(it, finite) for it in needed)


def _cut(schema: Schema, finite: Collection[str]) -> Schema:
    if isinstance(schema, bool):
        return schema
    if "$ref" in schema and _name(schema) not in finite:
        return False
    cut = dict(schema)
    for name in _LISTS:
        if name in cut:
            cut[name] = [_cut(it, finite) for it in cut[name]]
    for name in _MAPS:
        if name in cut:
            cut[name] = {key: _cut(it, finite) for key, it in cut[name].items()}
    for name in _SINGLE:
        if name in cut:
            cut[name] = _cut(cut[name], finite)
    return cut
