"""What a client binds an answer to, in the client's own form."""

import enum
from dataclasses import dataclass
from typing import Any

from jserve.core.errors import RequestError

MAX_SOURCE_BYTES = 1 << 20  # of a source as JSON


class GrammarKind(enum.Enum):
    """Forms of a source; the values are vLLM's names."""

    JSON = "json"  # a JSON Schema: parsed JSON, or its text
    JSON_OBJECT = "json_object"  # any JSON object; the value is True
    REGEX = "regex"  # text
    CHOICE = "choice"  # a list of texts
    GRAMMAR = "grammar"  # text, Lark or EBNF
    STRUCTURAL_TAG = "structural_tag"  # parsed JSON, or its text


class Whitespace(enum.Enum):
    """Whitespace between the tokens of JSON."""

    NONE = "none"
    ONE = "one"  # at most one space or newline, so that small models come to an end
    ANY = "any"  # as JSON has it


@dataclass(frozen=True, slots=True, kw_only=True)
class GrammarSource:
    """A grammar as a client gave it. The value is unchecked JSON; `text.grammar_text` checks it."""

    kind: GrammarKind
    value: Any
    field: str  # of the request, as errors name it
    whitespace: Whitespace | str = Whitespace.ONE  # text: a regular expression
    fit: bool = False  # the answer ends within max_tokens

    def refused(self, fault: str, path: str = "") -> RequestError:
        """The error that says `fault` of the part of this source at `path`."""
        return RequestError(f"{self.field}{path}: {fault}", param=self.field)
