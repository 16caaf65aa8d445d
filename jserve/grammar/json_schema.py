"""JSON Schema (draft 2020-12) → the schema that llguidance compiles, or a refusal by name.

llguidance ignores or misreads some of JSON Schema in silence. What is written here has only
keywords, values and references that it follows exactly; everything else is an error that names
keyword and path. Annotations are left out, and so is what nothing refers to.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import unquote

from jserve.grammar import keywords
from jserve.grammar.finite import without_endless
from jserve.grammar.keywords import Refused
from jserve.grammar.one_of import are_disjoint
from jserve.grammar.pointers import resolve

Schema = dict[str, Any] | bool

_MAX_DEPTH = 96
_MAX_SCHEMAS = 20_000  # subschemas of one schema
_APPLICATORS = ("$ref", "allOf", "anyOf", "oneOf", "const", "enum")
_ONE_NAME = re.compile(r"\^[A-Za-z0-9_ -]+\$")
_EXCLUSIVE = (("exclusiveMinimum", "minimum", 1), ("exclusiveMaximum", "maximum", -1))
_OLD_DRAFTS = ("draft-03", "draft-04", "draft-06", "draft-07")


def _never(value: Any) -> bool:
    return False


# Keywords that no grammar follows, with the values of them that say nothing.
_UNSUPPORTED: Mapping[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("if", "then", "else", "contains", "minContains", "maxContains"), _never),
    **dict.fromkeys(("$dynamicRef", "$recursiveRef"), _never),
    **dict.fromkeys(("divisibleBy", "disallow", "extends"), _never),  # of draft 3
    "not": lambda value: value is False,
    "uniqueItems": lambda value: value is False,
    **dict.fromkeys(("dependentRequired", "dependentSchemas", "dependencies"), lambda it: it == {}),
    **dict.fromkeys(
        ("unevaluatedItems", "unevaluatedProperties"), lambda it: it is True or it == {}
    ),
    "nullable": lambda value: value is False,  # of OpenAPI: who writes it counts on it
}
_REMEDIES = {"nullable": '; name null among the types: "type": [..., "null"]'}


def check_json_schema(schema: Any, refused: Refused, root: Any = None) -> dict[str, Any]:
    """Returns the schema for llguidance with the meaning of `schema`.

    `refused(fault, path)` makes the error of a fault. Properties keep their order, in which they
    are written. References lead into `root`, if it is given, else into `schema`.
    """
    return _Checker(schema, refused, schema if root is None else root).whole()


class _Checker:
    """One schema that is being checked."""

    def __init__(self, schema: Any, refused: Refused, root: Any) -> None:
        self._schema = schema
        self._root = root
        self._refused = refused
        self._names: dict[str, str] = {}  # by JSON pointer: of the definitions that are written
        self._unchecked: list[tuple[str, Any]] = []  # pointers, and what is there
        self._num_schemas = 0
        self._multiples = keywords.Multiples()
        self._bounds = keywords.bounds_in(root)
        draft = root.get("$schema") if isinstance(root, dict) else None
        self._is_old = isinstance(draft, str) and any(name in draft for name in _OLD_DRAFTS)

    def whole(self) -> dict[str, Any]:
        checked = self._subschema(self._schema, "", 0)
        definitions: dict[str, Schema] = {}
        while self._unchecked:
            pointer, found = self._unchecked.pop()
            path = "".join(f".{part}" for part in pointer.split("/")[1:])
            definitions[self._names[pointer]] = self._subschema(found, path, 0)
        whole, definitions = without_endless(checked, definitions)
        if whole is False:
            endless = "no finite document is valid, since its $ref goes on for ever"
            raise self._refused("false: nothing is valid" if checked is False else endless, "")
        if whole is True:
            return {}
        return {**whole, "$defs": definitions} if definitions else whole

    def _subschema(self, schema: Any, path: str, depth: int) -> Schema:
        self._num_schemas += 1
        if depth > _MAX_DEPTH:
            raise self._refused(f"schemas are nested deeper than {_MAX_DEPTH}", path[:200])
        if self._num_schemas > _MAX_SCHEMAS:
            raise self._refused(f"the schema is too large: over {_MAX_SCHEMAS} within it", "")
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise self._refused("a schema must be an object, true or false", path)
        self._check_names(schema, path)
        # llguidance reads keywords in groups that end at an applicator, and a group does not see
        # the next: what stands for itself is kept together, where `properties` is.
        before: list[tuple[str, Any]] = []
        after: list[tuple[str, Any]] = []
        for name, value in schema.items():
            if name == "properties":
                before, after = after, []
            elif name in _APPLICATORS:
                after.append(self._applicator(name, value, f"{path}.{name}", depth))
        simple = self._simple(schema, path)
        self._array(schema, simple, path, depth)
        self._object(schema, simple, path, depth)
        return _joined([*before, *simple.items(), *after])

    def _check_names(self, schema: dict[str, Any], path: str) -> None:
        """Refuses the keywords that no grammar follows."""
        for name, says_nothing in _UNSUPPORTED.items():
            if name in schema and not says_nothing(schema[name]):
                remedy = _REMEDIES.get(name, "")
                raise self._refused(f"{name} is not supported{remedy}", f"{path}.{name}")
        if path and isinstance(schema.get("$id"), str):
            raise self._refused("$id is supported at the top only", f"{path}.$id")
        if self._is_old and "$ref" in schema:
            known = {*_APPLICATORS[1:], *keywords.BOUNDS, *keywords.LENGTHS, *_OTHERS}
            if beside := [name for name in schema if name in known]:
                fault = f"$ref makes this draft ignore {beside[0]} beside it; use draft 2020-12"
                raise self._refused(fault, f"{path}.$ref")

    # Applicators: schemas for the same value.

    def _applicator(self, name: str, value: Any, where: str, depth: int) -> tuple[str, Any]:
        if name == "$ref":
            return name, self._ref(value, where)
        if name == "const":
            return name, keywords.literal(value, where, name, self._refused)
        if not isinstance(value, list):
            raise self._refused(f"{name} must be a list", where)
        if not value:
            raise self._refused(f"{name} is empty: nothing is valid", where)
        if name == "enum":
            return name, [
                keywords.literal(it, f"{where}[{i}]", name, self._refused)
                for i, it in enumerate(value)
            ]
        checked = [self._subschema(it, f"{where}[{i}]", depth + 1) for i, it in enumerate(value)]
        if name == "oneOf" and are_disjoint(value, self._root):
            return "anyOf", checked
        return name, checked

    def _ref(self, value: Any, where: str) -> str:
        if not isinstance(value, str):
            raise self._refused("$ref must be a string", where)
        if value not in ("", "#") and not value.startswith("#/"):
            fault = f"$ref {value[:100]!r} is not supported; only '#' and '#/...' are"
            raise self._refused(fault, where)
        pointer = unquote(value[1:])
        if pointer not in self._names:
            found = resolve(self._root, pointer)
            if found is None:
                raise self._refused(f"$ref {value[:100]!r} leads nowhere", where)
            self._unchecked.append((pointer, found))
            self._names[pointer] = str(len(self._names))
        return f"#/$defs/{self._names[pointer]}"

    # Keywords of one value.

    def _simple(self, schema: dict[str, Any], path: str) -> dict[str, Any]:
        out: dict[str, Any] = {}
        refused = self._refused
        if "type" in schema:
            out["type"] = keywords.types(schema["type"], f"{path}.type", refused)
        for name in keywords.BOUNDS:
            if name in schema:
                value = keywords.bound(schema, name, f"{path}.{name}", refused)
                if value is not None:
                    out[name] = value
        if "number" in out.get("type", "number"):
            self._include_bounds(out, path)
        if "multipleOf" in schema:
            where = f"{path}.multipleOf"
            out["multipleOf"] = self._multiples.check(schema["multipleOf"], where, refused)
        for name in keywords.LENGTHS:
            if name in schema:
                out[name] = keywords.length(schema[name], f"{path}.{name}", name, refused)
        if "pattern" in schema:
            where = f"{path}.pattern"
            out["pattern"] = keywords.pattern(schema["pattern"], where, "pattern", refused)
        if "format" in schema:
            written = keywords.text_format(schema, f"{path}.format", refused)
            if "pattern" in written and "pattern" in out:
                out["allOf"] = [written]
            else:
                out |= written
        return out

    def _include_bounds(self, out: dict[str, Any], path: str) -> None:
        for name, other, direction in _EXCLUSIVE:
            value = out.get(name)
            if value is not None and keywords.may_be_written(value, direction, self._bounds):
                near = keywords.inclusive(out.pop(name), direction, f"{path}.{name}", self._refused)
                stricter = max if direction > 0 else min
                out[other] = stricter(out.get(other, near), near)

    def _array(self, schema: dict[str, Any], out: dict[str, Any], path: str, depth: int) -> None:
        items, prefix = schema.get("items"), schema.get("prefixItems")
        of_prefix, of_items = "prefixItems", "items"
        if isinstance(items, list):  # before draft 2020-12
            prefix, items = items, schema.get("additionalItems")
            of_prefix, of_items = "items", "additionalItems"
        if prefix is not None:
            where = f"{path}.{of_prefix}"
            if not isinstance(prefix, list):
                raise self._refused(f"{of_prefix} must be a list of schemas", where)
            out["prefixItems"] = [
                self._subschema(it, f"{where}[{i}]", depth + 1) for i, it in enumerate(prefix)
            ]
        if items is not None:
            out["items"] = self._subschema(items, f"{path}.{of_items}", depth + 1)

    def _object(self, schema: dict[str, Any], out: dict[str, Any], path: str, depth: int) -> None:
        for name in ("properties", "patternProperties"):
            if name in schema:
                out[name] = self._properties(schema[name], f"{path}.{name}", depth, name)
        _name_literals(out)
        name = "additionalProperties"
        if name in schema:
            out[name] = self._subschema(schema[name], f"{path}.{name}", depth + 1)
        if "propertyNames" in schema:
            self._property_names(schema, out, f"{path}.propertyNames")
        required = schema.get("required", [])
        if not isinstance(required, list) or not all(isinstance(it, str) for it in required):
            raise self._refused("required must be a list of names", f"{path}.required")
        for name in required:
            keywords.check_text(name, f"{path}.required", self._refused)
        if required:
            out["required"] = list(dict.fromkeys(required))
        # llguidance counts a name twice that is written twice.
        least, num_required = out.get("minProperties", 0), len(out.get("required", []))
        if least <= num_required:
            out.pop("minProperties", None)
        elif least > 1:
            fault = "minProperties above 1 is supported up to the number of required properties"
            raise self._refused(fault, f"{path}.minProperties")

    def _properties(self, value: Any, where: str, depth: int, name: str) -> dict[str, Schema]:
        if not isinstance(value, dict):
            raise self._refused(f"{name} must be an object", where)
        checked: dict[str, Schema] = {}
        for key, it in value.items():
            keywords.check_text(key, where, self._refused)
            if name == "patternProperties":
                kept = keywords.pattern(key, where, name, self._refused)
            else:
                kept = key
            checked[kept] = self._subschema(it, f"{where}.{key}", depth + 1)
        return checked

    def _property_names(self, schema: dict[str, Any], out: dict[str, Any], where: str) -> None:
        """Writes propertyNames as properties or as a pattern of them, where all others are free."""
        value = schema["propertyNames"]
        if value is True or value in ({}, {"type": "string"}):
            return
        kinds = {"pattern", "enum", "const"} & set(value) if isinstance(value, dict) else set()
        known = {*kinds, "type", "title", "description"}
        beside = ("properties", "patternProperties", "required")
        if (
            len(kinds) != 1
            or set(value) - known
            or value.get("type", "string") != "string"
            or any(schema.get(name) for name in beside)
        ):
            fault = (
                "propertyNames is supported with one of pattern, enum and const, and without "
                "properties, patternProperties and required beside it"
            )
            raise self._refused(fault, where)
        more = out.get("additionalProperties", True)
        out["additionalProperties"] = False
        (kind,) = kinds
        if kind == "pattern":
            name = keywords.pattern(value["pattern"], where, "pattern", self._refused)
            out["patternProperties"] = {name: more}
            return
        names = value["enum"] if kind == "enum" else [value["const"]]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise self._refused(f"propertyNames: {kind} must name texts", where)
        for name in names:
            keywords.check_text(name, where, self._refused)
        out["properties"] = dict.fromkeys(names, more)


_OTHERS = (
    *("type", "multipleOf", "pattern", "format", "items", "prefixItems", "additionalItems"),
    *("properties", "patternProperties", "additionalProperties", "propertyNames", "required"),
)


def _name_literals(out: dict[str, Any]) -> None:
    """Writes patterns of one name as the property of this name.

    As a pattern beside the property it would be a name that nobody can write, after a comma.
    """
    patterns: dict[str, Schema] = out.get("patternProperties", {})
    for pattern in [it for it in patterns if _ONE_NAME.fullmatch(it)]:
        properties: dict[str, Schema] = out.setdefault("properties", {})
        name, schema = pattern[1:-1], patterns.pop(pattern)
        properties[name] = {"allOf": [properties[name], schema]} if name in properties else schema
    if not patterns:
        out.pop("patternProperties", None)


def _joined(keyed: list[tuple[str, Any]]) -> dict[str, Any]:
    """One schema of all keywords; one that comes twice is moved into allOf."""
    schema: dict[str, Any] = {}
    again: list[Schema] = []
    for name, value in keyed:
        if name not in schema:
            schema[name] = value
        elif name == "allOf":
            again += value
        else:
            again.append({name: value})
    if again:
        schema["allOf"] = [*schema.get("allOf", []), *again]
    return schema
