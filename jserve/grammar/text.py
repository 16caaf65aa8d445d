"""Grammars in llguidance's own form from what clients give: one text that engines compile."""

import json
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from jserve.core.request_check import MAX_GRAMMAR_CHARS
from jserve.grammar.json_schema import check_json_schema
from jserve.grammar.lark import GrammarTextError, lark_text
from jserve.grammar.patterns import PatternError, regex_literal, translate_pattern
from jserve.grammar.source import GrammarKind, GrammarSource, Whitespace
from jserve.grammar.structural_tag import structural_tag_text

_MAX_CHOICES = 50_000
# Without \u: it could spell a property's name in a way that the grammar takes for another name.
_ESCAPES = 'nrbtf\\"'
_WHITESPACE: Mapping[Whitespace, dict[str, Any]] = {
    Whitespace.NONE: {"whitespace_flexible": False},
    Whitespace.ONE: {"whitespace_pattern": r"[ \n]"},
    Whitespace.ANY: {"whitespace_pattern": r"[\x20\x0A\x0D\x09]+"},
}
# Patterns of JSON's whitespace and of nothing else: characters and classes, repeated or not.
_JSON_SPACE = r"(?:[ \n\t\r]|\\[ntrs]|\\x(?:20|0[aAdD9]))"
_REPEATED = r"(?:[?*+]|\{\d{1,4}(?:,\d{0,4})?\})?"
_WHITESPACE_PATTERN = re.compile(rf"(?:(?:{_JSON_SPACE}|\[{_JSON_SPACE}+\]){_REPEATED})*")


def grammar_text(source: GrammarSource, special_tokens: Mapping[str, int]) -> str:
    """Returns the text of a grammar; `special_tokens` are ids by the text of a token.

    Raises RequestError that names the field, and the part of it that is wrong or not supported.
    What the text means to a tokenizer, and whether it is too complex, `check.check_source` finds.
    """
    try:
        text = json.dumps({"grammars": [_grammar(source, special_tokens)]}, ensure_ascii=False)
        text.encode()
    except RecursionError:
        raise source.refused("is nested too deeply") from None
    except UnicodeEncodeError:
        raise source.refused("holds a lone surrogate; send valid Unicode") from None
    if len(text) > MAX_GRAMMAR_CHARS:
        raise source.refused(f"its grammar has {len(text)} characters; at most {MAX_GRAMMAR_CHARS}")
    return text


def _grammar(source: GrammarSource, special_tokens: Mapping[str, int]) -> dict[str, Any]:
    value = source.value
    match source.kind:
        case GrammarKind.JSON:
            return {"json_schema": checked_schema(source, parsed(source), "")}
        case GrammarKind.JSON_OBJECT:
            return {"json_schema": checked_schema(source, {"type": "object"}, "")}
        case GrammarKind.REGEX:
            return {"lark_grammar": f"start: {_regex(source)}\n"}
        case GrammarKind.CHOICE:
            return {"lark_grammar": _choice(source)}
        case GrammarKind.GRAMMAR:
            try:
                lark = lark_text(_text(source), lambda it: checked_schema(source, it, ".%json"))
            except GrammarTextError as error:
                raise source.refused(str(error)) from None
            return {"lark_grammar": lark}
        case GrammarKind.STRUCTURAL_TAG:
            value = parsed(source)
            lark = structural_tag_text(
                value,
                source.refused,
                lambda schema, path: checked_schema(source, schema, path),
                special_tokens,
            )
            return {"lark_grammar": lark}


def parsed(source: GrammarSource) -> Any:
    """The value of a source that is JSON, or its text."""
    if not isinstance(source.value, str):
        return source.value
    try:
        return json.loads(source.value, parse_constant=_no_constant)
    except ValueError as error:
        raise source.refused(f"is no valid JSON: {error}") from None


def checked_schema(
    source: GrammarSource, schema: Any, path: str, root: Any = None
) -> dict[str, Any]:
    """Returns a schema of `source` with all that llguidance is told of it."""
    checked = check_json_schema(schema, lambda it, where: source.refused(it, path + where), root)
    return {**checked, "x-guidance": {"json_allowed_escapes": _ESCAPES, **_spaces(source)}}


def _spaces(source: GrammarSource) -> dict[str, Any]:
    if isinstance(source.whitespace, Whitespace):
        return _WHITESPACE[source.whitespace]
    if not _WHITESPACE_PATTERN.fullmatch(source.whitespace):
        raise source.refused(
            "the whitespace pattern must be of spaces, \\n, \\t and \\r only, for example '[ \\n]?'"
        )
    if not source.whitespace:
        return _WHITESPACE[Whitespace.NONE]
    return {"whitespace_pattern": source.whitespace.replace(r"\s", r"[ \n\t\r]")}


def _text(source: GrammarSource) -> str:
    if not isinstance(source.value, str):
        raise source.refused("must be a string")
    if not source.value.strip():
        raise source.refused("is empty")
    return source.value


def _regex(source: GrammarSource) -> str:
    try:
        return regex_literal(translate_pattern(_text(source)))
    except PatternError as error:
        raise source.refused(str(error)) from None


def _choice(source: GrammarSource) -> str:
    values = source.value
    if not isinstance(values, list) or not all(isinstance(it, str) for it in values):
        raise source.refused("must be a list of strings")
    if not values:
        raise source.refused("is empty; name at least one choice")
    if len(values) > _MAX_CHOICES:
        raise source.refused(f"has {len(values)} choices; at most {_MAX_CHOICES}")
    for value in values:
        value.encode()  # or the whole is refused
    if "" in values:
        raise source.refused("a choice is empty")
    if len(set(values)) < len(values):
        twice = Counter(values).most_common(1)[0][0]
        raise source.refused(f"names {twice[:40]!r} twice")
    # One terminal: as alternatives of a rule each would have a state of its own.
    return f"start: CHOICE\nCHOICE: {' | '.join(map(json.dumps, values))}\n"


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")
