"""Compiles what clients give, and words what llguidance finds wrong with it."""

import json
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from jserve.core.errors import RequestError
from jserve.grammar.compiler import GrammarCompiler, first_line
from jserve.grammar.source import GrammarKind, GrammarSource
from jserve.grammar.text import checked_schema, grammar_text, parsed

_MOST_TRIED = 200  # subschemas that are compiled alone, to find the one that is at fault
_TOKENS_TRIED = 16
_WORDS = {
    "oneOf constraints": "oneOf is supported where its options exclude each other by their types, "
    "or by the constants of a property that all of them require",
    "Regex is empty": "nothing is valid: pattern, format and the lengths exclude each other",
    "min/maxProperties only": "minProperties and maxProperties are supported where all properties "
    "are required, or where exactly these properties are allowed and the bound is 1",
    "Unsatisfiable schema: ": "nothing is valid: ",
    "Parser Error": "it is too complex: ",
    "schema too large": "the schema is too large",
    "circular references with sibling": "$ref with keywords beside it must not lead to itself",
    "lookarounds not supported yet": "pattern: only ^ at its start and $ at its end; ",
    "regex parse error": "pattern: it is no regular expression that is supported here",
    "patternProperty regexes": "patternProperties must exclude each other: ",
}


def check_source(
    source: GrammarSource, compiler: GrammarCompiler, special_tokens: Mapping[str, int]
) -> str:
    """Returns the text of a grammar that compiles, and has a first token.

    Raises RequestError with the field of `source`.
    """
    text = grammar_text(source, special_tokens)
    fault = _fault(text, compiler)
    if fault is None:
        return text
    raise source.refused(_worded(fault), _path(source, fault, compiler))


def _fault(text: str, compiler: GrammarCompiler) -> str | None:
    try:
        matcher = compiler.matcher(text)
    except RequestError as error:
        return str(error)
    # What is too complex to compile may show at the first tokens only.
    for _ in range(_TOKENS_TRIED):
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        if mask and not matcher.is_error():
            matcher.consume_token((mask & -mask).bit_length() - 1)
        if matcher.is_error():
            return first_line(matcher.get_error())
        if not mask:
            return "no text of this model's tokens fulfils it"
        if matcher.is_stopped():
            break
    return None


def _worded(fault: str) -> str:
    for theirs, ours in _WORDS.items():
        if theirs in fault:
            rest = fault.split(theirs, 1)[1].lstrip(" ;:") if ours.endswith((": ", "; ")) else ""
            return (ours + rest).rstrip("; ")
    return fault


def _path(source: GrammarSource, fault: str, compiler: GrammarCompiler) -> str:
    """Path of the smallest subschema with this fault; empty where there is none."""
    if source.kind is not GrammarKind.JSON:
        return ""
    root = parsed(source)
    for path, schema in islice(_subschemas(root, ""), _MOST_TRIED):
        alone = GrammarSource(
            kind=GrammarKind.JSON, value=schema, field=source.field, whitespace=source.whitespace
        )
        try:
            checked = checked_schema(alone, schema, path, root)
        except RequestError:
            continue
        text = json.dumps({"grammars": [{"json_schema": checked}]}, ensure_ascii=False)
        if _fault(text, compiler) == fault:
            return path
    return ""


def _subschemas(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """All objects of a schema with their paths, inner ones first."""
    if isinstance(value, dict):
        for key, it in value.items():
            yield from _subschemas(it, f"{path}.{key}")
        if path:
            yield path, value
    elif isinstance(value, list):
        for i, it in enumerate(value):
            yield from _subschemas(it, f"{path}[{i}]")
