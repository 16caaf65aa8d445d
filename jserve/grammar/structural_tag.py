"""Structural tags: free text with bound parts in it, as vLLM and xgrammar have them → Lark."""

import json
from collections.abc import Callable, Mapping
from typing import Any

from jserve.core.errors import RequestError
from jserve.grammar.patterns import PatternError, regex_literal, translate_pattern

Refused = Callable[[str, str], RequestError]
CheckSchema = Callable[[Any, str], dict[str, Any]]  # the schema, and its path

_MAX_DEPTH = 32
_TEXT = r"TEXT: /(?s:.*)/"


def structural_tag_text(
    tag: Any, refused: Refused, check_schema: CheckSchema, special_tokens: Mapping[str, int]
) -> str:
    """Returns the Lark grammar of a tag.

    Free text goes on until a trigger; then one of the structures with this trigger is bound until
    its end. Texts of `special_tokens`, by which the ids are found, stand for the
    token, which is no text to a grammar.
    """
    if not isinstance(tag, dict):
        raise refused("must be an object", "")
    if tag.get("type", "structural_tag") != "structural_tag":
        raise refused("type must be 'structural_tag'", ".type")
    rules = _Rules(refused, check_schema, special_tokens)
    if "format" in tag:
        start = rules.format(tag["format"], ".format", 0)
    else:
        start = rules.triggered(tag, "structures", "")
    return "\n".join([f"start: {start}", *rules.lines, _TEXT, ""])


class _Rules:
    """The rules of one grammar, as they are found."""

    def __init__(
        self, refused: Refused, check_schema: CheckSchema, special_tokens: Mapping[str, int]
    ) -> None:
        self.lines: list[str] = []
        self._refused = refused
        self._check_schema = check_schema
        # The longest first: one may begin with another.
        self._ids = special_tokens
        self._special = sorted(special_tokens, key=len, reverse=True)

    def _rule(self, body: str, options: str = "") -> str:
        name = f"part_{len(self.lines)}"
        self.lines.append(f"{name}{options}: {body}")
        return name

    def triggered(self, data: Mapping[str, Any], of_tags: str, path: str) -> str:
        """Free text with tags in it; `data` has the triggers, and the tags in `of_tags`."""
        triggers = self._texts(data.get("triggers"), f"{path}.triggers")
        tags = data.get(of_tags)
        if not isinstance(tags, list) or not tags:
            raise self._refused(f"{of_tags} must be a list that is not empty", f"{path}.{of_tags}")
        # A trigger that begins with another is never waited for.
        shortest = [
            it for it in triggers if not any(it != o and it.startswith(o) for o in triggers)
        ]
        parts: dict[str, list[str]] = {trigger: [] for trigger in shortest}
        for i, tag in enumerate(tags):
            where = f"{path}.{of_tags}[{i}]"
            begin, bound = self._tag(tag, where, 0)
            trigger = next((it for it in shortest if begin.startswith(it)), None)
            if trigger is None:
                raise self._refused("begin must start with one of the triggers", f"{where}.begin")
            parts[trigger].append(f"{self.literal(begin[len(trigger) :])} {bound}")
        options = [
            self._rule(f"{self._trigger(trigger)} ({' | '.join(rests)})")
            for trigger, rests in parts.items()
            if rests
        ]
        times = "+" if data.get("at_least_one") is True else "*"
        if data.get("stop_after_first") is True:
            return f"({' | '.join(options)})" + ("" if times == "+" else " | TEXT")
        return f"({' | '.join(options)}){times} TEXT"

    def _trigger(self, trigger: str) -> str:
        """Free text to the end of a trigger."""
        special = self._starts_special(trigger)
        if special is not None:
            return f"TEXT {self._token(special)} {self.literal(trigger[len(special) :])}"
        return self._rule(f"TEXT {_quoted(trigger)}", "[lazy]")

    def _starts_special(self, text: str) -> str | None:
        return next((it for it in self._special if text.startswith(it)), None)

    def _tag(self, tag: Any, where: str, depth: int) -> tuple[str, str]:
        """Returns how a tag begins, and the expression of what follows, its end included."""
        if not isinstance(tag, dict):
            raise self._refused("must be an object", where)
        ends = tag.get("end", "")
        if isinstance(ends, list) and len(ends) == 1:
            ends = ends[0]
        begin = tag.get("begin")
        if not isinstance(begin, str) or not begin:
            raise self._refused("begin must be a text that is not empty", f"{where}.begin")
        if not isinstance(ends, str):
            raise self._refused("end must be a text", f"{where}.end")
        for name, text in (("begin", begin), ("end", ends)):
            self._check_text(text, f"{where}.{name}")
        if "content" in tag:
            return begin, self._content(tag["content"], ends, f"{where}.content", depth + 1)
        name = "schema" if "schema" in tag else "structure"
        if name not in tag:
            raise self._refused("schema is missing", f"{where}.schema")
        return begin, f"{self._json(tag[name], f'{where}.{name}')} {self.literal(ends)}"

    def _content(self, data: Any, end: str, where: str, depth: int) -> str:
        kind = data.get("type") if isinstance(data, dict) else None
        if end and kind == "any_text":
            return self._trigger(end)
        if end and kind == "regex" and not self._starts_special(end):
            # Of one lexeme: else the pattern could take the end for its own.
            pattern = self._pattern(data.get("pattern"), f"{where}.pattern")
            return self._rule(f"{pattern} {_quoted(end)}", "[lazy]")
        return f"({self.format(data, where, depth)}) {self.literal(end)}"

    def format(self, data: Any, where: str, depth: int) -> str:
        """What the newer form of tags describes: an expression of a rule."""
        if not isinstance(data, dict) or depth > _MAX_DEPTH:
            raise self._refused("must be an object, not nested too deeply", where)
        match data.get("type"):
            case "const_string":
                (text,) = self._texts([data.get("value")], f"{where}.value")
                return self.literal(text)
            case "json_schema":
                return self._json(data.get("json_schema"), f"{where}.json_schema")
            case "regex":
                return self._rule(self._pattern(data.get("pattern"), f"{where}.pattern"))
            case "any_text":
                return "TEXT"
            case "tag":
                begin, bound = self._tag(data, where, depth)
                return f"{self.literal(begin)} {bound}"
            case "sequence" | "or" as kind:
                elements = data.get("elements")
                if not isinstance(elements, list) or not elements:
                    raise self._refused("elements must be a list, not empty", f"{where}.elements")
                if kind == "sequence" and any(
                    isinstance(it, dict) and it.get("type") == "any_text" for it in elements[:-1]
                ):
                    fault = "any_text is supported as the last of a sequence, or in a tag"
                    raise self._refused(fault, f"{where}.elements")
                read = [
                    self.format(it, f"{where}.elements[{i}]", depth + 1)
                    for i, it in enumerate(elements)
                ]
                return f"({')('.join(read) if kind == 'sequence' else ')|('.join(read)})"
            case "triggered_tags":
                return self.triggered(data, "tags", where)
            case other:
                known = "const_string, json_schema, regex, any_text, tag, sequence, or"
                fault = f"type {str(other)[:40]!r} is not supported; {known} and triggered_tags are"
                raise self._refused(fault, f"{where}.type")

    def _json(self, schema: Any, where: str) -> str:
        if schema is None:
            raise self._refused("the schema is missing", where)
        return self._rule(f"%json {json.dumps(self._check_schema(schema, where))}")

    def _pattern(self, pattern: Any, where: str) -> str:
        if not isinstance(pattern, str):
            raise self._refused("must be a text", where)
        try:
            return regex_literal(translate_pattern(pattern))
        except PatternError as error:
            raise self._refused(str(error), where) from None

    def _texts(self, value: Any, where: str) -> list[str]:
        if not isinstance(value, list) or not all(isinstance(it, str) and it for it in value):
            raise self._refused("must be texts that are not empty", where)
        if not value:
            raise self._refused("must not be empty", where)
        for text in value:
            self._check_text(text, where)
        return list(dict.fromkeys(value))

    def _check_text(self, text: str, where: str) -> None:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise self._refused("holds a lone surrogate", where) from None

    def literal(self, text: str) -> str:
        """A text as a sequence of strings and special tokens."""
        parts: list[str] = []
        start = position = 0
        while position < len(text):
            token = next((it for it in self._special if text.startswith(it, position)), None)
            if token is None:
                position += 1
                continue
            if position > start:
                parts.append(_quoted(text[start:position]))
            parts.append(self._token(token))
            start = position = position + len(token)
        if position > start:
            parts.append(_quoted(text[start:position]))
        return " ".join(parts)

    def _token(self, text: str) -> str:
        return f"<[{self._ids[text]}]>"


def _quoted(text: str) -> str:
    """A string of Lark, in JSON's syntax."""
    return json.dumps(text)
