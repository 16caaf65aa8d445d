"""Grammars that force calls, in llguidance's Lark: what the formats share."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from jserve.core.errors import RequestError
from jserve.gateway.tools.format import ChoiceMode, Schema, Tool, WantedCalls

# Any text. Special tokens are no text for llguidance.
TEXT = r"/(?s:.*)/"


class Lark:
    """A grammar that is being written: rules with names of their own, literals and schemas."""

    def __init__(self, special: Mapping[str, int]) -> None:
        self._special = special
        self._rules: list[str] = []
        self._num_names = 0
        pattern = "|".join(map(re.escape, sorted(special, key=len, reverse=True)))
        self._special_pattern = re.compile(f"({pattern})" if pattern else r"(?!)()")

    def literal(self, text: str) -> str:
        """Returns the expression for exactly this text, its special tokens as tokens.

        Tokens are named by id: llguidance takes names in angle brackets alone.
        """
        pieces = self._special_pattern.split(text)
        return " ".join(
            f"<[{self._special[piece]}]>" if i % 2 else json.dumps(piece, ensure_ascii=False)
            for i, piece in enumerate(pieces)
            if piece
        )

    def is_special(self, text: str) -> bool:
        return text in self._special

    def name(self) -> str:
        """Returns a name that no rule has."""
        self._num_names += 1
        return f"r{self._num_names}"

    def rule(self, body: str, *, name: str = "", options: str = "") -> str:
        """Adds a rule and returns its name."""
        name = name or self.name()
        self._rules.append(f"{name}{options}: {body}")
        return name

    def terminal(self, body: str) -> str:
        """Adds a terminal (a regular expression) and returns its name."""
        return self.rule(body, name=self.name().upper())

    def schema(self, schema: Schema) -> str:
        """Adds a rule for JSON of this schema and returns its name."""
        return self.rule(f"%json {json.dumps(schema)}")

    def any_of(self, bodies: Iterable[str]) -> str:
        """Adds a rule for one of the bodies, and returns its name."""
        return self.rule(" | ".join(bodies))

    def text(self) -> str:
        return "\n".join(["%llguidance {}", *self._rules, ""])


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How the calls of an answer stand in it.

    `marker` is how the whole begins if calls may follow text. Without it an answer of calls is one
    whose first character after white space is in `leads`. `prefix` is a special token that may
    come before all.
    """

    whole: tuple[str, str] = ("", "")  # around all calls
    each: tuple[str, str] = ("", "")  # around one
    separator: str = ""
    marker: str = ""
    prefix: str = ""
    leads: str = ""


WriteCall: TypeAlias = Callable[[Lark, Tool, Schema], str]


def call_grammar(wanted: WantedCalls, layout: Layout, write_call: WriteCall) -> str | None:
    """Writes the grammar of `ToolFormat.grammar`; `write_call` gives the expression of one call."""
    if wanted.free:
        return None
    lark = Lark(wanted.special)
    one = any_call(lark, wanted, write_call)
    more = ""
    if wanted.several:
        more = lark.rule(_row(lark, layout.separator + layout.each[0], one, layout.each[1]))

    def calls(begin: str) -> str:
        first = _row(lark, begin, one, layout.each[1])
        return " ".join(filter(None, (first, more and f"{more}*", lark.literal(layout.whole[1]))))

    opening = layout.whole[0] + layout.each[0]
    start = calls(opening)
    if layout.prefix and lark.is_special(layout.prefix):
        start += f" | {calls(layout.prefix + opening)}"
    if wanted.choice.mode is ChoiceMode.AUTO and layout.marker:
        text = lark.terminal(TEXT)
        rest = calls(opening.removeprefix(layout.marker))
        if lark.is_special(layout.marker):
            start = f"{text} | {text} {lark.literal(layout.marker)} {rest}"
        else:
            # Lazy: the first marker in the text ends it, so none can be written as text.
            lead = lark.rule(f"{text} {lark.literal(layout.marker)}", name="lead", options="[lazy]")
            start = f"{text} | {lead} {rest}"
    elif wanted.choice.mode is ChoiceMode.AUTO:
        leads = "".join(f"\\{char}" for char in layout.leads)
        start += " | " + lark.terminal(rf"/[ \t\r\n]*([^{leads} \t\r\n](?s:.*))?/")
    lark.rule(start, name="start")
    return lark.text()


def any_call(lark: Lark, wanted: WantedCalls, write_call: WriteCall) -> str:
    """Adds a rule for a call of any tool, and returns its name.

    Raises RequestError if there is no tool, or one's schema cannot be written.
    """
    calls: list[str] = []
    for tool, schema in wanted.bound():
        try:
            calls.append(write_call(lark, tool, schema))
        except RecursionError as error:
            raise RequestError(
                f"tools: the schema of {tool.name!r} is nested too deeply", param="tools"
            ) from error
    return lark.any_of(calls)


def _row(lark: Lark, begin: str, rule: str, end: str) -> str:
    return " ".join(filter(None, (lark.literal(begin), rule, lark.literal(end))))


def json_call(arguments_key: str = "arguments") -> WriteCall:
    """Returns how to write a call as an object of a name and arguments."""

    def write(lark: Lark, tool: Tool, schema: Schema) -> str:
        name = json.dumps(tool.name, ensure_ascii=False)
        head = f'{{"name": {name}, "{arguments_key}": '
        return f'{lark.literal(head)} {lark.schema(schema)} "}}"'

    return write
