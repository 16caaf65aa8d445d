"""Grammars of clients as text: Lark in llguidance's dialect, or EBNF as llama.cpp has it (GBNF).

What a grammar holds in `%json` is checked like every schema.
"""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

from llguidance.gbnf_to_lark import GbnfToLarkError, gbnf_to_lark

_TOKENS = re.compile(
    r"""
    (?P<skip>[ \t\r]+|(?:\#|//)[^\n]*)
  | (?P<newline>\n)
  | (?P<json>%json\b)
  | (?P<nested>%(?:regex|llguidance)\b)
  | (?P<directive>%[a-z]+)
  | (?P<string>"(?:\\.|[^"\\\n])*"i?)
  | (?P<regexp>/(?:\\.|[^/\\\n])+/[imslux]*)
  | (?P<special><[^<>\s]+>)
  | (?P<name>[?!]*_?[A-Za-z][A-Za-z0-9_\-]*)
  | (?P<reference>@[A-Za-z0-9_\-]+)
  | (?P<number>[+-]?[0-9]+)
  | (?P<mark>\.\.|->|::|.)
    """,
    re.VERBOSE,
)
_ESCAPED_CODE = re.compile(r"\\(?:u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))", re.DOTALL)
_STRINGS_AND_CLASSES = re.compile(r'"(?:\\.|[^"\\])*"|\[(?:\\.|[^\]\\])*\]|#[^\n]*', re.DOTALL)

Token = tuple[str, str]  # kind and text
CheckSchema = Callable[[Any], dict[str, Any]]


class GrammarTextError(ValueError):
    """A grammar that is wrong, or that no finite text fulfils."""


def lark_text(text: str, check_schema: CheckSchema) -> str:
    """Returns `text` in Lark; EBNF is known by its `::=`.

    Raises GrammarTextError, and what `check_schema` raises for a schema after `%json`.
    """
    if is_ebnf(text):
        return _from_ebnf(text)
    written, tokens = _read(text, check_schema)
    _check_ends(tokens)
    return written


def is_ebnf(text: str) -> bool:
    """Whether rules are defined with `::=`."""
    return "::=" in _STRINGS_AND_CLASSES.sub("", text)


def _from_ebnf(text: str) -> str:
    # An alternative may begin a line; llguidance's reader wants the bar at the end of the last.
    text = re.sub(r"\s*\n\s*\|", " |", text)
    try:
        written = gbnf_to_lark(_ESCAPED_CODE.sub(_shorter_escape, text))
    except GbnfToLarkError as error:
        raise GrammarTextError(f"the EBNF cannot be read: {error}") from None
    except RecursionError:
        raise GrammarTextError("the EBNF is nested too deeply") from None
    except Exception as error:  # the reader raises these for rules that are missing or twice there
        raise GrammarTextError(f"the EBNF cannot be read: {error}") from None
    _check_ends(list(_tokens(written)))
    return written


def _shorter_escape(match: re.Match[str]) -> str:
    """Escapes that both strings and classes of Lark have; the reader breaks others."""
    digits = match[1] or match[2]
    if digits is None:
        return match[0]
    code = int(digits, 16)
    if code < 0x80:
        return rf"\x{code:02x}"
    if code > 0x10FFFF or 0xD800 <= code <= 0xDFFF:
        raise GrammarTextError(f"{match[0]} is no character")
    return chr(code)


def _tokens(text: str) -> Iterator[Token]:
    for match in _TOKENS.finditer(text):
        if match.lastgroup not in ("skip", None):
            yield str(match.lastgroup), match[0]


def _read(text: str, check_schema: CheckSchema) -> tuple[str, list[Token]]:
    """Returns the text with checked schemas, and its tokens; a schema is one token."""
    written: list[str] = []
    tokens: list[Token] = []
    position = 0
    while (match := _TOKENS.match(text, position)) is not None:
        kind, position = str(match.lastgroup), match.end()
        written.append(match[0])
        if kind in ("json", "nested"):
            start = len(text) - len(text[position:].lstrip())
            try:
                value, position = json.JSONDecoder().raw_decode(text, start)
            except (ValueError, RecursionError) as error:
                raise GrammarTextError(f"no JSON after {match[0]}: {error}") from None
            if kind == "json":
                value = check_schema(value)
            written.append(" " + json.dumps(value, ensure_ascii=False))
        if kind != "skip":
            tokens.append((kind, match[0]))
    return "".join(written), tokens


# Rules, and whether each of them has a finite text.


def _check_ends(tokens: list[Token]) -> None:
    """Refuses grammars in which a rule that `start` reaches never comes to an end.

    What this reader of rules does not know is left to llguidance.
    """
    rules = _rules(tokens)
    if rules is None or "start" not in rules:
        return
    parsed: dict[str, Any] = {}
    try:
        for name, body in rules.items():
            parsed[name] = _Expression(body).parse()
    except (_Unknown, RecursionError):
        return
    ending: set[str] = set()
    while found := {n for n, it in parsed.items() if n not in ending and _ends(it, parsed, ending)}:
        ending |= found
    reached, waiting = set[str](), ["start"]
    while waiting:
        name = waiting.pop()
        if name not in reached and name in parsed:
            reached.add(name)
            waiting += _names(parsed[name])
    if endless := sorted(reached - ending):
        name = "start" if "start" in endless else endless[0]
        raise GrammarTextError(f"rule {name!r} never ends: it has no finite text")


class _Unknown(Exception):
    """A piece of syntax that is left to llguidance."""


def _rules(tokens: list[Token]) -> dict[str, list[Token]] | None:
    """Splits tokens into the bodies of rules; None for grammars with parameters."""
    if ("mark", "::") in tokens:
        return None
    rules: dict[str, list[Token]] = {}
    body: list[Token] = []
    for line in _lines(tokens):
        if line[0] == ("mark", "|"):
            body += line
        elif line[0][0] == "name" and (colon := _colon(line)) is not None:
            body = line[colon + 1 :]
            rules[line[0][1].lstrip("?!")] = body
        elif line[0][0] in ("directive", "nested"):
            body = []
        else:
            body += line
    return rules


def _lines(tokens: list[Token]) -> Iterator[list[Token]]:
    line: list[Token] = []
    for token in tokens:
        if token[0] != "newline":
            line.append(token)
        elif line:
            yield line
            line = []
    if line:
        yield line


def _colon(line: list[Token]) -> int | None:
    """Where the head of a rule, `name[options]:`, ends."""
    inside = 0
    for i, (kind, text) in enumerate(line[1:], 1):
        if text in ("[", "{"):
            inside += 1
        elif text in ("]", "}"):
            inside -= 1
        elif not inside:
            return i if (kind, text) == ("mark", ":") else None
    return None


class _Expression:
    """Reads the right side of a rule into tuples of an operator and its operands."""

    def __init__(self, tokens: list[Token]) -> None:
        self._tokens = tokens
        self._next = 0

    def parse(self) -> Any:
        read = self._choice()
        if self._next < len(self._tokens):
            raise _Unknown
        return read

    def _peek(self) -> str:
        return self._tokens[self._next][1] if self._next < len(self._tokens) else ""

    def _choice(self) -> Any:
        options = [self._sequence()]
        while self._peek() == "|":
            self._next += 1
            options.append(self._sequence())
        return ("any", options)

    def _sequence(self) -> Any:
        items: list[Any] = []
        while self._peek() not in ("", "|", ")", "]"):
            if self._peek() == "->":  # a name for the tree, which nobody builds
                self._next += 2
                continue
            items.append(self._repeated(self._atom()))
        return ("all", items)

    def _atom(self) -> Any:
        kind, text = self._tokens[self._next]
        self._next += 1
        if text in ("(", "["):
            inner = self._choice()
            if self._peek() != (")" if text == "(" else "]"):
                raise _Unknown
            self._next += 1
            return inner if text == "(" else ("any", [inner, ("all", [])])
        if text == "~" or text == "&":  # of terminals, which llguidance checks
            return ("all", [])
        if kind == "name":
            return ("rule", text.lstrip("?!"))
        if kind in ("string", "regexp", "special", "json", "nested", "reference"):
            return ("all", [])
        if text == "..":
            return ("all", [])
        raise _Unknown

    def _repeated(self, item: Any) -> Any:
        while self._peek() in ("?", "*", "+", "{", "~"):
            mark = self._peek()
            self._next += 1
            if mark in ("?", "*"):
                item = ("any", [item, ("all", [])])
            elif mark == "{":
                least = self._peek()
                while self._peek() not in ("}", ""):
                    self._next += 1
                self._next += 1
                if least in ("0", ","):
                    item = ("any", [item, ("all", [])])
            elif mark == "~":
                least = self._peek()
                self._next += 1
                if self._peek() == "..":
                    self._next += 2
                if least == "0":
                    item = ("any", [item, ("all", [])])
        return item


def _ends(read: Any, rules: dict[str, Any], ending: set[str]) -> bool:
    operator, operands = read
    if operator == "rule":
        return operands in ending or operands not in rules
    if operator == "any":
        return any(_ends(it, rules, ending) for it in operands)
    return all(_ends(it, rules, ending) for it in operands)


def _names(read: Any) -> list[str]:
    operator, operands = read
    if operator == "rule":
        return [operands]
    return [name for it in operands for name in _names(it)]
