"""Schemas with documents that are valid and that are not, by keyword.

In valid documents properties have the order of the schema, in which a grammar writes them.
"""

from typing import Any, NamedTuple


class Case(NamedTuple):
    """One schema."""

    schema: Any
    valid: list[Any]
    invalid: list[Any]


EVERY_TYPE = [None, True, 3, 1.5, "s", [1], {"k": 1}]
NODE = {
    "type": "object",
    "properties": {
        "value": {"type": "integer"},
        "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]},
    },
    "required": ["value", "next"],
    "additionalProperties": False,
}


def tagged(kind: str, **properties: Any) -> dict[str, Any]:
    """An object with a required, constant `kind`."""
    return {
        "type": "object",
        "properties": {"kind": {"const": kind}, **properties},
        "required": ["kind", *properties],
        "additionalProperties": False,
    }


TYPES = [
    Case({}, EVERY_TYPE, []),
    Case(True, EVERY_TYPE, []),
    Case({"type": "null"}, [None], [0, False, "", [], {}]),
    Case({"type": "boolean"}, [True, False], [0, 1, "true", None]),
    Case({"type": "integer"}, [0, 7, -12, 10**18], [1.5, "1", None, True]),
    Case({"type": "number"}, [0, -7, 1.5, -0.25, 1e300, 1e-7], ["1", None, False]),
    Case({"type": "string"}, ["", "a", "é", "😀", 'q"\\', "\n\t"], [1, None, ["a"]]),
    Case({"type": "array"}, [[], [1, "a", None], [[[]]]], [{}, "[]", 1]),
    Case({"type": "object"}, [{}, {"a": 1}, {"a": {"b": []}}], [[], "{}", None]),
    Case({"type": ["string", "null"]}, ["", "x", None], [1, False, []]),
    Case({"type": ["integer", "string"]}, [1, "1"], [1.5, None]),
    Case({"type": ["integer", "number"]}, [1, 1.5], ["1"]),
    Case({"type": ["array", "object"]}, [[], {}], [1, "a"]),
    Case({"type": ["string"]}, ["a"], [1]),
    Case({"type": "integer", "title": "t", "description": "d", "default": "x"}, [1], ["x"]),
    Case({"type": "integer", "x-note": {"type": "string"}, "example": 1}, [1], ["x"]),
    Case({"type": "integer", "$comment": "c", "examples": ["x"], "deprecated": True}, [1], ["x"]),
    Case({"$schema": "https://json-schema.org/draft/2020-12/schema", "type": "null"}, [None], [1]),
    Case({"$id": "https://example.com/root", "type": "null"}, [None], [1]),
]
NUMBERS = [
    Case({"type": "number", "exclusiveMinimum": 1, "maximum": 1.25}, [1.25, 1.0001], [1, 1.3]),
    Case({"type": "number", "minimum": -1.5, "exclusiveMaximum": -1}, [-1.5, -1.01], [-1, -0.5]),
    Case({"type": "number", "exclusiveMinimum": 1.2, "maximum": 1.25}, [1.25, 1.21], [1.2, 1.3]),
    Case({"exclusiveMinimum": 0, "exclusiveMaximum": 1}, [0.5, 0.0001, "x"], [0, 1, 1.5, -1]),
    Case({"type": "number", "exclusiveMaximum": 2**53}, [1, 2.5], [2**53]),
    Case({"minimum": 2}, [2, 2.5, 10, "x", None], [1, 1.9, -3]),
    Case({"type": "number", "minimum": 1.1}, [1.1, 2, 1.15], [1, 1.05, -2]),
    Case({"type": "integer", "minimum": 1.1}, [2, 17], [1, 0, -2]),
    Case({"type": "integer", "minimum": -2}, [-2, -1, 0, 5], [-3, -20]),
    Case({"type": "number", "minimum": -2.5}, [-2.5, -2, 0, 1.5], [-2.51, -3]),
    Case({"maximum": 3}, [3, 2.9, -4, "x"], [3.1, 4, 30]),
    Case({"type": "integer", "maximum": 300}, [300, 0, -9], [301, 1000]),
    Case({"type": "number", "maximum": 0.3}, [0.3, 0.1, -1], [0.31, 1]),
    Case({"exclusiveMinimum": 1.1}, [1.2, 2, "x"], [1.1, 1, 0.6]),
    Case({"type": "integer", "exclusiveMinimum": 3}, [4, 40], [3, 2]),
    Case({"type": "number", "exclusiveMinimum": 0}, [0.001, 1], [0, -0.5]),
    Case({"exclusiveMaximum": 3}, [2.9, 2, None], [3, 3.5]),
    Case({"type": "integer", "exclusiveMaximum": 3}, [2, -3], [3, 4]),
    Case({"type": "integer", "minimum": 1, "maximum": 10}, [1, 5, 10], [0, 11, 100, -1]),
    Case({"type": "integer", "minimum": -5, "maximum": 5}, [-5, 0, 5], [-6, 6, 55]),
    Case({"type": "number", "minimum": 0, "maximum": 1}, [0, 1, 0.5, 0.25], [1.01, -0.1, 2]),
    Case({"type": "integer", "minimum": 7, "maximum": 7}, [7], [6, 8, 77]),
    Case({"type": "integer", "minimum": 5, "exclusiveMinimum": 5}, [6], [5, 4]),
    Case({"type": "integer", "minimum": 5, "exclusiveMinimum": 2}, [5], [4]),
    Case(
        {"type": "integer", "minimum": -(2**53) + 1, "maximum": 2**53 - 1},
        [0, 2**53 - 1, -(2**53) + 1],
        [2**53, 10**17],
    ),
    Case({"type": "integer", "minimum": 0, "format": "uint32"}, [0, 9], [-1]),
    Case({"multipleOf": 2}, [10, 0, -4, "x"], [7, 3, -1]),
    Case({"type": "integer", "multipleOf": 7}, [7, 0, 49, 700], [8, 71]),
    Case({"type": "number", "multipleOf": 1.5}, [0, 4.5, 3], [35, 1]),
    Case({"type": "number", "multipleOf": 0.01}, [0, 0.75, 12.5, 3], [0.751, 0.001]),
    Case({"type": "integer", "multipleOf": 5, "minimum": 10, "maximum": 20}, [10, 15, 20], [5, 12]),
    Case({"allOf": [{"type": "integer", "multipleOf": 2}, {"multipleOf": 3}]}, [6, 12], [2, 3, 4]),
]
STRINGS = [
    Case({"minLength": 2}, ["fo", "foo", 1, None], ["f", ""]),
    Case({"type": "string", "minLength": 2}, ["éé", "😀😀"], ["é", "😀"]),
    Case({"maxLength": 2}, ["f", "fo", "", 100], ["foo"]),
    Case({"type": "string", "maxLength": 2}, ["éé", '""', "\n\n"], ["ééé", '"""']),
    Case({"type": "string", "minLength": 2.0, "maxLength": 3}, ["ab", "abc"], ["a", "abcd"]),
    Case({"type": "string", "maxLength": 0}, [""], ["a"]),
    Case({"pattern": "^a*$"}, ["", "aaa", 1, None, []], ["b", "aab"]),
    Case({"type": "string", "pattern": "a+"}, ["xxaayy", "a"], ["xx", ""]),
    Case({"type": "string", "pattern": "^a"}, ["a", "abc"], ["ba", ""]),
    Case({"type": "string", "pattern": "a$"}, ["a", "bba"], ["ab"]),
    Case({"type": "string", "pattern": "^a|b$"}, ["ax", "xb"], ["xa", "bx"]),
    Case({"type": "string", "pattern": "^(a|b)$"}, ["a", "b"], ["ab", ""]),
    Case({"type": "string", "pattern": r"^\d{2,3}$"}, ["12", "123"], ["1", "1234", "٣٣"]),
    Case({"type": "string", "pattern": r"^\w+$"}, ["a_1"], ["é", "a-b"]),
    Case({"type": "string", "pattern": r"^[\w.-]+$"}, ["a.b-c"], ["a b"]),
    Case({"type": "string", "pattern": r"^\D$"}, ["x", "٣"], ["3"]),
    Case({"type": "string", "pattern": r"^[^\d]$"}, ["x"], ["3"]),
    Case({"type": "string", "pattern": r"^\S+$"}, ["ab"], ["a b", "a\n"]),
    Case({"type": "string", "pattern": "^[a&&b]+$"}, ["a&b"], ["c"]),
    Case({"type": "string", "pattern": "^[[x]+$"}, ["[x"], ["]"]),
    Case({"type": "string", "pattern": r"^\u0041\x42$"}, ["AB"], ["ab"]),
    Case({"type": "string", "pattern": r"^a\/b\.c$"}, ["a/b.c"], ["a/bxc"]),
    Case({"type": "string", "pattern": r"^\$\^$"}, ["$^"], ["", "a"]),
    Case({"type": "string", "pattern": '^"$'}, ['"'], ["a"]),
    Case({"type": "string", "pattern": r"^\n$"}, ["\n"], ["n"]),
    Case({"type": "string", "pattern": "^(?:ab)+?$"}, ["ab", "abab"], ["aba"]),
    Case({"type": "string", "pattern": "^(?<year>[0-9]{4})$"}, ["2024"], ["24"]),
    Case({"type": "string", "pattern": "^.{2}$"}, ["ab", "é😀"], ["a\n", "abc"]),
    Case({"type": "string", "pattern": "^é+$"}, ["éé"], ["e"]),
    Case({"type": "string", "pattern": "^a", "minLength": 3}, ["abc"], ["ab", "xbc"]),
    Case({"type": "string", "pattern": "^[a-z]+$", "maxLength": 2}, ["ab"], ["abc", "1"]),
    Case({"type": "string", "format": "date", "pattern": "^2"}, ["2024-02-29"], ["1999-01-01"]),
    Case({"type": "string", "format": "password"}, ["x", ""], [1]),
    Case({"type": "string", "contentEncoding": "base64"}, ["x"], [1]),
]
LITERALS = [
    Case({"const": 2}, [2], [5, "2", 2.5, None]),
    Case({"const": "a"}, ["a"], ["b", "aa", "", 1]),
    Case({"const": 'é"\\\n/'}, ['é"\\\n/'], ["é"]),
    Case({"const": None}, [None], [0, False]),
    Case({"const": False}, [False], [0, True, [], None]),
    Case({"const": True}, [True], [1, False]),
    Case({"const": 0}, [0], [False, 1, ""]),
    Case({"const": 1.5}, [1.5], [1, 2, 1.25]),
    Case({"const": -0.125}, [-0.125], [0.125, -0.12]),
    Case({"const": 2**53}, [2**53], [2**53 - 1, 1]),
    Case({"const": [1, "a", None]}, [[1, "a", None]], [[], [1], [1, "a", None, 2], ["a", 1, None]]),
    Case({"const": []}, [[]], [[1], {}]),
    Case({"const": {}}, [{}], [{"a": 1}, []]),
    Case({"const": {"a": {"b": [1]}}}, [{"a": {"b": [1]}}], [{"a": {}}, {"a": {"b": [2]}}]),
    Case({"enum": [1, 2, 3]}, [1, 3], [4, "1", 12]),
    Case({"enum": [6, "foo", [], True, {"foo": 12}]}, [6, "foo", [], True, {"foo": 12}], [None, 1]),
    Case({"enum": [6, None]}, [6, None], ["x", 0]),
    Case({"enum": ["a\nb", "a"]}, ["a\nb", "a"], ["ab", "a\n"]),
    Case({"enum": [False]}, [False], [0, [False], True]),
    Case({"enum": [[0]]}, [[0]], [[False], 0]),
    Case({"enum": [1, 1.5, 2], "type": "integer"}, [1, 2], [1.5]),
    Case({"enum": ["ab", "a"], "minLength": 2}, ["ab"], ["a"]),
    Case({"enum": [1, "a"], "type": "string"}, ["a"], [1]),
    Case({"const": 5, "minimum": 3}, [5], [3]),
    Case({"enum": [f"name {i}" for i in range(300)]}, ["name 0", "name 299"], ["name 300", "name"]),
]
ARRAYS = [
    Case({"items": {"type": "integer"}}, [[], [1, 2, 3], {"foo": 1}, "x"], [[1, "x"], ["x"]]),
    Case({"type": "array", "items": True}, [[1, "x"], []], [1]),
    Case({"type": "array", "items": False}, [[]], [[1]]),
    Case(
        {"type": "array", "items": {"type": "array", "items": {"type": "null"}}}, [[[None]]], [[1]]
    ),
    Case({"minItems": 1}, [[1], [1, 2], "x"], [[]]),
    Case({"type": "array", "minItems": 2.0}, [[1, 2]], [[1], []]),
    Case({"maxItems": 2}, [[], [1, 2], {}], [[1, 2, 3]]),
    Case({"type": "array", "maxItems": 0}, [[]], [[1]]),
    Case({"type": "array", "minItems": 1, "maxItems": 2}, [[1], [1, 2]], [[], [1, 2, 3]]),
    Case(
        {"prefixItems": [{"type": "integer"}, {"type": "string"}]},
        [[1, "a"], [1], [], [1, "a", None]],
        [["a", 1], [1, 2]],
    ),
    Case(
        {"type": "array", "prefixItems": [{"type": "integer"}], "items": {"type": "string"}},
        [[1, "a"], [1], []],
        [[1, 1], ["a"]],
    ),
    Case(
        {"type": "array", "prefixItems": [{}, {}], "items": False}, [[], [1], [1, 2]], [[1, 2, 3]]
    ),
    Case({"type": "array", "prefixItems": [True, False]}, [[1], []], [[1, 2]]),
    Case(
        {"type": "array", "prefixItems": [{"const": 1}], "minItems": 2, "items": {"const": 2}},
        [[1, 2], [1, 2, 2]],
        [[1], [1, 1]],
    ),
    Case({"type": "array", "uniqueItems": False}, [[1, 1]], [1]),
    Case({"type": "array", "unevaluatedItems": True}, [[1]], [1]),
    Case(
        {"type": "array", "maxItems": 3, "items": {"enum": ["a", "b"]}}, [["a", "b", "a"]], [["c"]]
    ),
]
OLD_ARRAYS = [  # forms before draft 2020-12
    Case({"items": [{"type": "integer"}, {"type": "string"}]}, [[1, "a"], [1, "a", 5]], [["a"]]),
    Case({"items": [{}], "additionalItems": {"type": "integer"}}, [["a", 1]], [["a", "b"]]),
    Case({"items": [{}, {}], "additionalItems": False}, [[1, 2], []], [[1, 2, 3]]),
    Case({"items": {"type": "integer"}, "additionalItems": False}, [[1, 2]], [["a"]]),
]
OBJECTS = [
    Case(
        {"properties": {"foo": {"type": "integer"}, "bar": {"type": "string"}}},
        [{"foo": 1, "bar": "x"}, {}, {"foo": 1}, {"bar": "x"}, {"z": []}, [], 12],
        [{"foo": "x"}, {"foo": 1, "bar": 2}],
    ),
    Case(
        {"type": "object", "properties": {"a": True, "b": False}},
        [{}, {"a": 1}],
        [{"b": 2}, {"a": 1, "b": 2}],
    ),
    Case(
        {
            "type": "object",
            "properties": {
                "foo\nbar": {"type": "number"},
                'foo"bar': {"type": "number"},
                "foo\\bar": {"type": "number"},
            },
            "additionalProperties": False,
        },
        [{"foo\nbar": 1, 'foo"bar': 1, "foo\\bar": 1}],
        [{"foo\nbar": "1"}],
    ),
    Case(
        {
            "type": "object",
            "properties": {"é": {"type": "null"}, "名": {"type": "null"}},
            "additionalProperties": False,
        },
        [{"é": None, "名": None}],
        [{"e": None}],
    ),
    Case(
        {
            "type": "object",
            "properties": {"__proto__": {"type": "integer"}, "$ref": {"type": "string"}},
        },
        [{"__proto__": 1, "$ref": "a"}],
        [{"$ref": 1}],
    ),
    Case(
        {"type": "object", "properties": {"not": {"type": "integer"}, "if": {"type": "null"}}},
        [{"not": 1, "if": None}],
        [{"not": "x"}],
    ),
    Case(
        {"required": ["foo"], "properties": {"foo": {}, "bar": {}}},
        [{"foo": 1}, [], "x"],
        [{"bar": 1}, {}],
    ),
    Case(
        {"type": "object", "required": ["a", "b"]},
        [{"a": 1, "b": 2}, {"a": 1, "b": 2, "c": 3}],
        [{"a": 1}, {}],
    ),
    Case({"type": "object", "required": []}, [{}], [1]),
    Case(
        {"type": "object", "required": ["x"], "additionalProperties": {"type": "integer"}},
        [{"x": 1}],
        [{"x": "a"}, {}],
    ),
    Case(
        {"type": "object", "required": ["x"], "patternProperties": {"^x": {"type": "integer"}}},
        [{"x": 1}],
        [{"x": "a"}, {}],
    ),
    Case(
        {"type": "object", "properties": {"foo": {}}, "additionalProperties": False},
        [{"foo": 1}, {}],
        [{"foo": 1, "x": 1}, {"x": 1}],
    ),
    Case(
        {"type": "object", "properties": {"foo": {}}, "additionalProperties": {"type": "boolean"}},
        [{"foo": 1, "x": True}],
        [{"foo": 1, "x": 12}],
    ),
    Case(
        {"type": "object", "additionalProperties": {"type": "integer"}},
        [{}, {"a": 1, "b": 2}],
        [{"a": "x"}],
    ),
    Case({"type": "object", "additionalProperties": False}, [{}], [{"a": 1}]),
    Case(
        {"patternProperties": {"f.*o": {"type": "integer"}}},
        [{"foo": 1}, {"x": "y"}, [], 1],
        [{"foo": "bar"}, {"fxxo": None}],
    ),
    Case(
        {
            "type": "object",
            "patternProperties": {"^a": {"type": "integer"}, "^b": {"type": "string"}},
        },
        [{"a1": 1, "b1": "x"}],
        [{"a1": "x"}, {"b1": 1}],
    ),
    Case(
        {"type": "object", "patternProperties": {"^v": {}}, "additionalProperties": False},
        [{"v1": 1}],
        [{"w": 1}],
    ),
    Case(
        {
            "type": "object",
            "patternProperties": {"^a": {"type": "integer"}},
            "properties": {"ab": {"minimum": 3}},
        },
        [{"ab": 4}],
        [{"ab": 1}, {"ab": "x"}],
    ),
    Case(
        {
            "type": "object",
            "properties": {"c": {"type": "integer"}, "d": True},
            "patternProperties": {"^c$": {"minimum": 3}, "^e$": {"type": "null"}},
            "additionalProperties": False,
        },
        [{"c": 3, "d": 1, "e": None}, {"d": 1}, {}],
        [{"c": 2}, {"e": 1}, {"f": 1}],
    ),
    Case({"type": "object", "propertyNames": {"type": "string"}}, [{"a": 1}], [1]),
    Case(
        {"type": "object", "propertyNames": {"pattern": "^a+$"}},
        [{"a": 1, "aa": 2}, {}],
        [{"b": 1}],
    ),
    Case(
        {
            "type": "object",
            "propertyNames": {"enum": ["x", "y"]},
            "additionalProperties": {"type": "integer"},
        },
        [{"x": 1}, {"y": 2}, {"x": 1, "y": 2}],
        [{"z": 1}, {"x": "a"}],
    ),
    Case({"type": "object", "propertyNames": {"const": "x"}}, [{"x": 1}, {}], [{"y": 1}]),
    Case({"minProperties": 1}, [{"a": 1}, {"a": 1, "b": 2}, []], [{}]),
    Case(
        {"type": "object", "minProperties": 2, "required": ["a", "b"]},
        [{"a": 1, "b": 2}],
        [{"a": 1}],
    ),
    Case(
        {
            "type": "object",
            "minProperties": 1,
            "properties": {"a": {}, "b": {}},
            "additionalProperties": False,
        },
        [{"a": 1}, {"b": 1}, {"a": 1, "b": 1}],
        [{}],
    ),
    Case({"maxProperties": 1}, [{}, {"a": 1}, "x"], [{"a": 1, "b": 2}]),
    Case({"type": "object", "maxProperties": 0}, [{}], [{"a": 1}]),
    Case(
        {"type": "object", "maxProperties": 2, "required": ["a"]},
        [{"a": 1}, {"a": 1, "b": 1}],
        [{"a": 1, "b": 1, "c": 1}, {}],
    ),
    Case(
        {"type": "object", "dependentRequired": {}, "unevaluatedProperties": True}, [{"a": 1}], [1]
    ),
]
COMBINED = [
    Case({"allOf": [{"type": "integer"}, {"minimum": 3}]}, [3, 9], [2, "x", 3.5]),
    Case(
        {
            "allOf": [
                {"type": "object", "properties": {"bar": {"type": "integer"}}, "required": ["bar"]},
                {"type": "object", "properties": {"foo": {"type": "string"}}, "required": ["foo"]},
            ]
        },
        [{"bar": 2, "foo": "x"}],
        [{"bar": 2}, {"foo": "x"}, {"bar": "y", "foo": "x"}],
    ),
    Case(
        {
            "properties": {"bar": {"type": "integer"}},
            "required": ["bar"],
            "allOf": [{"properties": {"foo": {"type": "string"}}, "required": ["foo"]}],
        },
        [{"bar": 1, "foo": "x"}],
        [{"foo": "x"}, {"bar": 1}],
    ),
    Case({"allOf": [{"maximum": 30}], "minimum": 20}, [25, 30, 20], [35, 10]),
    Case({"allOf": [True, {"type": "null"}]}, [None], [1]),
    Case({"allOf": [{}]}, [1, "x"], []),
    Case(
        {
            "allOf": [
                {
                    "type": "object",
                    "properties": {"a": {"type": "integer"}},
                    "additionalProperties": False,
                },
                {"type": "object", "properties": {"b": {}}},
            ]
        },
        [{"a": 1}, {}],
        [{"a": 1, "b": 1}, {"b": 1}],
    ),
    Case(
        {"type": "object", "allOf": [{"properties": {"a": {}}}], "additionalProperties": False},
        [{}],
        [{"a": 1}],
    ),
    Case(
        {
            "type": "object",
            "properties": {"b": {}},
            "allOf": [{"properties": {"a": {}}}],
            "additionalProperties": {"type": "integer"},
        },
        [{"b": "x", "a": 1}],
        [{"b": 1, "a": "x"}],
    ),
    Case(
        {
            "type": "object",
            "patternProperties": {"^p": {"type": "string"}},
            "anyOf": [{"required": ["a"]}, {"required": ["p1"]}],
            "additionalProperties": {"type": "integer"},
        },
        [{"a": 1}, {"p1": "x"}],
        [{"p1": 1}, {"a": "x"}],
    ),
    Case(
        {"allOf": [{"type": "array", "minItems": 1}, {"items": {"type": "integer"}}]},
        [[1]],
        [[], ["a"]],
    ),
    Case(
        {"allOf": [{"pattern": "^a"}, {"pattern": "z$"}], "type": "string"},
        ["az", "a-z"],
        ["a", "z"],
    ),
    Case({"allOf": [{"enum": [1, 2, 3]}, {"enum": [2, 3, 4]}]}, [2, 3], [1, 4]),
    Case(
        {"allOf": [{"type": ["string", "null"]}, {"type": ["null", "integer"]}]}, [None], ["a", 1]
    ),
    Case({"anyOf": [{"type": "integer"}, {"minimum": 2}]}, [1, 2.5, 3, "x"], [1.5]),
    Case(
        {"type": "string", "anyOf": [{"maxLength": 2}, {"minLength": 4}]},
        ["ab", "abcd"],
        ["abc", 3],
    ),
    Case({"anyOf": [True, False]}, [1, "x"], []),
    Case({"anyOf": [{"type": "null"}, False]}, [None], [1]),
    Case(
        {
            "anyOf": [
                {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
                {"type": "object", "properties": {"b": {"type": "string"}}, "required": ["b"]},
            ]
        },
        [{"a": 1}, {"b": "x"}],
        [{"a": "x"}, {}],
    ),
    Case(
        {
            "type": "object",
            "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
            "anyOf": [{"required": ["a"]}, {"required": ["b"]}],
        },
        [{"a": 1}, {"b": 2}, {"a": 1, "b": 2}],
        [{}, {"c": 1}],
    ),
    Case({"anyOf": [{"anyOf": [{"type": "null"}]}]}, [None], [1]),
    Case(
        {"anyOf": [{"type": "string"}, {"type": "integer"}], "minLength": 2}, ["ab", 1], ["a", None]
    ),
    Case({"oneOf": [{"type": "integer"}, {"type": "string"}]}, [1, "a"], [1.5, None]),
    Case({"oneOf": [{"type": "integer", "minimum": 2}]}, [2], [1]),
    Case({"oneOf": [{"const": 1}, {"const": 2}]}, [1, 2], [3]),
    Case({"oneOf": [{"enum": ["a", "b"]}, {"enum": ["c"]}]}, ["a", "c"], ["d"]),
    Case(
        {"oneOf": [{"type": "null"}, {"type": "array", "items": {"type": "null"}}]},
        [None, [None]],
        [[1]],
    ),
    Case({"oneOf": [{"type": "string"}, False]}, ["a"], [1]),
    Case(
        {
            "oneOf": [
                tagged("cat", lives={"type": "integer"}),
                tagged("dog", name={"type": "string"}),
            ]
        },
        [{"kind": "cat", "lives": 9}, {"kind": "dog", "name": "rex"}],
        [{"kind": "cat", "name": "rex"}, {"kind": "cow"}],
    ),
    Case(
        {
            "oneOf": [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}],
            "discriminator": {"propertyName": "kind"},
            "$defs": {"cat": tagged("cat"), "dog": tagged("dog")},
        },
        [{"kind": "cat"}, {"kind": "dog"}],
        [{"kind": "cow"}, {}],
    ),
    Case(
        {
            "anyOf": [{"type": "null"}, {"type": "integer"}],
            "oneOf": [{"type": "string"}, {"type": "integer"}],
        },
        [1],
        [None, "a"],
    ),
    Case({"minimum": 1, "anyOf": [{"type": "integer"}], "maximum": 3}, [1, 3], [0, 4, 1.5]),
    Case(
        {
            "type": "array",
            "prefixItems": [{"type": "integer"}],
            "anyOf": [{"minItems": 1}],
            "items": False,
        },
        [[1]],
        [[], ["a"], [1, 2]],
    ),
    Case({"not": False, "type": "null"}, [None], [1]),
]
REFERENCES = [
    Case({"$ref": "#/$defs/a", "$defs": {"a": {"type": "integer"}}}, [1], ["a"]),
    Case({"$ref": "#/definitions/a", "definitions": {"a": {"type": "integer"}}}, [1], ["a"]),
    Case(
        {"properties": {"foo": {"type": "integer"}, "bar": {"$ref": "#/properties/foo"}}},
        [{"bar": 3}, {"foo": 1, "bar": 3}],
        [{"bar": "x"}],
    ),
    Case(
        {
            "$defs": {
                "a": {"$ref": "#/$defs/b"},
                "b": {"$ref": "#/$defs/c"},
                "c": {"type": "null"},
            },
            "$ref": "#/$defs/a",
        },
        [None],
        [1],
    ),
    Case({"$defs": {"a/b~c": {"type": "null"}}, "$ref": "#/$defs/a~1b~0c"}, [None], [1]),
    Case({"$defs": {"a b%": {"type": "null"}}, "$ref": "#/$defs/a%20b%25"}, [None], [1]),
    Case({"prefixItems": [{"type": "integer"}, {"$ref": "#/prefixItems/0"}]}, [[1, 2]], [[1, "a"]]),
    Case(
        {"$ref": "#/$defs/a", "minimum": 3, "$defs": {"a": {"type": "integer"}}}, [3, 4], [2, "x"]
    ),
    Case(
        {"$ref": "#/$defs/a", "maxItems": 2, "$defs": {"a": {"type": "array"}}},
        [[], [1, 2]],
        [[1, 2, 3], "x"],
    ),
    Case(
        {"properties": {"$ref": {"type": "string"}}, "type": "object"},
        [{"$ref": "a"}],
        [{"$ref": 2}],
    ),
    Case(
        {"$ref": "#/$defs/node", "$defs": {"node": NODE}},
        [{"value": 1, "next": None}, {"value": 1, "next": {"value": 2, "next": None}}],
        [{"value": 1}, {"value": 1, "next": {}}],
    ),
    Case(
        {"type": "object", "properties": {"foo": {"$ref": "#"}}, "additionalProperties": False},
        [{"foo": {}}, {"foo": {"foo": {}}}, {}],
        [{"bar": 1}, {"foo": {"bar": 1}}],
    ),
    Case(
        {"$defs": {"t": {"type": "array", "items": {"$ref": "#/$defs/t"}}}, "$ref": "#/$defs/t"},
        [[], [[], [[]]]],
        [[1], {}],
    ),
    Case(
        {
            "type": "object",
            "properties": {"a": {"$ref": "#/$defs/endless"}, "b": {"type": "null"}},
            "$defs": {
                "endless": {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/endless"}}
            },
        },
        [{"b": None}, {}],
        [{"a": []}],
    ),
    Case({"$defs": {"unused": {"not": {}}}, "type": "null"}, [None], [1]),
    Case({"$ref": "#/$defs/no", "$defs": {"no": True}}, [1, "x"], []),
    Case(
        {"anyOf": [{"$ref": "#/$defs/no"}, {"type": "null"}], "$defs": {"no": False}}, [None], [1]
    ),
    Case(
        {
            "allOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}],
            "$defs": {"a": {"type": "integer"}, "b": {"minimum": 2}},
        },
        [2],
        [1],
    ),
    Case(
        {
            "type": "object",
            "properties": {"a": {"$ref": "#/$defs/s", "description": "d"}},
            "$defs": {"s": {"type": "string"}},
        },
        [{"a": "x"}],
        [{"a": 1}],
    ),
]
CASES = {
    "types": TYPES,
    "numbers": NUMBERS,
    "strings": STRINGS,
    "literals": LITERALS,
    "arrays": ARRAYS,
    "objects": OBJECTS,
    "combined": COMBINED,
    "references": REFERENCES,
}

# Formats, and texts that have them and that have not.
FORMATS: dict[str, tuple[list[str], list[str]]] = {
    "date": (
        ["1963-06-19", "2020-02-29", "2000-02-29", "2024-12-31"],
        [
            "2023-02-29",
            "1900-02-29",
            "2020-02-30",
            "2023-04-31",
            "06/19/1963",
            "2023-1-1",
            "2023-13-01",
        ],
    ),
    "time": (
        ["08:30:06Z", "23:59:59.52-08:00", "00:00:00+23:59"],
        ["24:00:00Z", "08:60:00Z", "08:30:06", "8:30:06Z"],
    ),
    "date-time": (
        ["1963-06-19T08:30:06.283185Z", "1990-12-31T15:59:50-08:00"],
        ["1990-02-31T15:59:59Z", "1963-06-19T08:30:06", "06/19/1963 08:30:06 PST"],
    ),
    "duration": (
        ["P4DT12H30M5S", "P1Y", "PT1M", "P4W", "PT0S"],
        ["P", "PT", "4DT12H", "P1D2H", "P2S", "P1Y2W"],
    ),
    "email": (
        ["joe.bloggs@example.com", "te~st@example.com", "a@b"],
        ["2962", ".test@example.com", "te..st@example.com", "a@"],
    ),
    "hostname": (["www.example.com", "host", "a-b.c1"], ["-a.com", "a_b", "a-.com", "", "a..b"]),
    "ipv4": (
        ["192.168.0.1", "255.255.255.255", "0.0.0.0"],
        ["256.0.0.1", "127.0.0", "1.2.3.4.5", "01.2.3.4"],
    ),
    "ipv6": (
        ["::1", "::", "1:2:3:4:5:6:7:8", "fe80::a", "1::"],
        ["12345::", "1:2", "1:2:3:4:5:6:7:8:9", "::g", ":1:2"],
    ),
    "uuid": (
        ["2eb8aa08-aa98-11ea-b4aa-73b441d16380", "2EB8AA08-AA98-11EA-B4AA-73B441D16380"],
        ["2eb8aa08-aa98-11ea-b4aa-73b441d1638", "2eb8aa08aa9811eab4aa73b441d16380"],
    ),
    "uri": (
        ["http://foo.bar/?baz=qux#quux", "urn:isbn:1", "mailto:a@b.c"],
        ["//foo.bar", "/abc", "abc", "http:// x", "bar,baz:foo\\"],
    ),
}

# Schemas that are refused, and the keyword that the message names.
REFUSED: list[tuple[Any, str]] = [
    ({"not": {}}, "not"),
    ({"not": {"type": "integer"}}, "not"),
    ({"if": {"const": 0}, "then": {"minimum": 1}}, "if"),
    ({"then": {"const": 0}}, "then"),
    ({"else": {"const": 0}}, "else"),
    ({"contains": {"minimum": 5}}, "contains"),
    ({"contains": {}, "minContains": 2}, "contains"),
    ({"maxContains": 2}, "maxContains"),
    ({"uniqueItems": True}, "uniqueItems"),
    ({"dependentRequired": {"bar": ["foo"]}}, "dependentRequired"),
    ({"dependentSchemas": {"bar": {"minProperties": 2}}}, "dependentSchemas"),
    ({"dependencies": {"bar": ["foo"]}}, "dependencies"),
    ({"unevaluatedProperties": False}, "unevaluatedProperties"),
    ({"unevaluatedItems": False}, "unevaluatedItems"),
    ({"$dynamicRef": "#node"}, "$dynamicRef"),
    ({"$recursiveRef": "#"}, "$recursiveRef"),
    ({"nullable": True, "type": "string"}, "nullable"),
    ({"extends": {}}, "extends"),
    ({"divisibleBy": 2}, "divisibleBy"),
    ({"$schema": "http://json-schema.org/draft-04/schema#", "contains": {}}, "contains"),
    ({"$ref": "http://example.com/schema.json"}, "$ref"),
    ({"$ref": "other.json#/a"}, "$ref"),
    ({"$ref": "#foo", "$defs": {"a": {"$anchor": "foo"}}}, "$ref"),
    ({"$ref": "#/$defs/missing"}, "$ref"),
    ({"$ref": 5}, "$ref"),
    (
        {
            "$schema": "http://json-schema.org/draft-07/schema#",
            "$ref": "#/definitions/a",
            "minimum": 1,
            "definitions": {"a": {"type": "integer"}},
        },
        "$ref",
    ),
    (
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
        "$ref",
    ),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}]}}}, "$ref"),
    ({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "$ref"),
    ({"$ref": "#", "type": "object"}, "$ref"),
    ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, "$ref"),
    ({"$defs": {"a": {"$id": "http://x/a", "type": "null"}}, "$ref": "#/$defs/a"}, "$id"),
    ({"properties": {"a": {"$id": "inner"}}}, "$id"),
    ({"oneOf": [{"type": "integer"}, {"minimum": 2}]}, "oneOf"),
    ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "oneOf"),
    ({"oneOf": [{"type": "boolean"}, {"const": True}]}, "oneOf"),
    ({"oneOf": [True, {"type": "null"}]}, "oneOf"),
    ({"oneOf": [{"required": ["a"]}, {"required": ["b"]}], "type": "object"}, "oneOf"),
    (
        {
            "oneOf": [
                {"type": "object", "properties": {"k": {"const": 1}}},
                {"type": "object", "properties": {"k": {"const": 2}}},
            ]
        },
        "oneOf",
    ),
    ({"oneOf": [{"const": [1]}, {"const": [2]}, {"type": "array"}]}, "oneOf"),
    ({"oneOf": []}, "oneOf"),
    ({"anyOf": []}, "anyOf"),
    ({"allOf": {}}, "allOf"),
    ({"enum": []}, "enum"),
    ({"enum": "a"}, "enum"),
    ({"enum": [2**53 + 1]}, "enum"),
    ({"const": 2**63}, "const"),
    ({"const": 1e20}, "const"),
    ({"const": 1000000000000000.2}, "const"),
    ({"const": "a\x01"}, "const"),
    ({"const": {"a": [2**60]}}, "const"),
    ({"minimum": "1"}, "minimum"),
    ({"minimum": 2**60}, "minimum"),
    ({"maximum": True}, "maximum"),
    ({"exclusiveMinimum": True}, "exclusiveMinimum"),
    ({"exclusiveMaximum": 5e-324}, "exclusiveMaximum"),
    ({"multipleOf": 0}, "multipleOf"),
    ({"multipleOf": -1}, "multipleOf"),
    ({"multipleOf": 1e-20}, "multipleOf"),
    ({"multipleOf": 4294967295}, "multipleOf"),
    ({"allOf": [{"multipleOf": 65537}, {"multipleOf": 65539}]}, "multipleOf"),
    ({"minLength": -1}, "minLength"),
    ({"minLength": 1.5}, "minLength"),
    ({"maxLength": "1"}, "maxLength"),
    ({"maxLength": 2**40}, "maxLength"),
    ({"maxItems": True}, "maxItems"),
    ({"minItems": 10**9}, "minItems"),
    ({"type": "object", "minProperties": 2}, "minProperties"),
    ({"type": "object", "minProperties": 1, "properties": {"a": {}}}, "minProperties"),
    ({"type": "object", "maxProperties": 1, "properties": {"a": {}, "b": {}}}, "maxProperties"),
    ({"type": "strin"}, "type"),
    ({"type": []}, "type"),
    ({"type": 5}, "type"),
    ({"type": ["string", None]}, "type"),
    ({"required": True}, "required"),
    ({"required": [1]}, "required"),
    ({"properties": []}, "properties"),
    ({"properties": {"a": 5}}, "properties.a"),
    ({"items": 5}, "items"),
    ({"prefixItems": {}}, "prefixItems"),
    ({"additionalProperties": "no"}, "additionalProperties"),
    ({"patternProperties": {"^a": {}, "b$": {}}}, "patternProperties"),
    ({"patternProperties": {"(?=a)": {}}}, "patternProperties"),
    ({"propertyNames": {"maxLength": 3}}, "propertyNames"),
    ({"propertyNames": {"pattern": "^a"}, "properties": {"a": {}}}, "propertyNames"),
    ({"pattern": "(?=a)"}, "pattern"),
    ({"pattern": "(?<!a)b"}, "pattern"),
    ({"pattern": r"\bfoo\b"}, "pattern"),
    ({"pattern": r"(a)\1"}, "pattern"),
    ({"pattern": "a$b"}, "pattern"),
    ({"pattern": "("}, "pattern"),
    ({"pattern": "a{,3}"}, "pattern"),
    ({"pattern": "[]"}, "pattern"),
    ({"pattern": "(?i)a"}, "pattern"),
    ({"pattern": "a\\"}, "pattern"),
    ({"pattern": 5}, "pattern"),
    ({"type": "string", "pattern": "^a$", "minLength": 5}, "pattern"),
    ({"format": "idn-email"}, "format"),
    ({"format": "regex"}, "format"),
    ({"type": "string", "format": "int32"}, "format"),
    ({"format": 5}, "format"),
    (False, "false"),
    ("string", "schema"),
    ([], "schema"),
    ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "valid"),
    ({"type": "integer", "minimum": 3, "maximum": 2}, "valid"),
    ({"type": "array", "items": False, "minItems": 1}, "valid"),
    ({"type": "object", "required": ["a"], "additionalProperties": False}, "valid"),
    ({"type": "object", "required": ["a"], "properties": {"a": False}}, "valid"),
]
