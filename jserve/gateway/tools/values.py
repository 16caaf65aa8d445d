"""Values in the languages that models write arguments in, put out as JSON while they are read."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from typing import TypeAlias

from jserve.gateway.tools.reading import NotACall, Reading, Steps

Out: TypeAlias = Callable[[str], object]

# Deeper documents than this are refused: what reads them in clients recurses.
MAX_DEPTH = 200

_SPACE = re.compile(r"[ \t\r\n]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """How a language writes what JSON can say.

    `escape` reads the escape that starts at an index: its JSON and its end, or None while it is
    incomplete. `scalar` gives the JSON of a bare word or number, or None if it is none.
    """

    quotes: Mapping[str, str]  # from opening to closing; those that begin with others come first
    brackets: Mapping[str, str]  # from opening to closing, of arrays
    plain: re.Pattern[str]  # what strings have that is the same in JSON and ends nothing
    escape: Callable[[str, int], tuple[str, int] | None] | None
    word: re.Pattern[str]
    scalar: Callable[[str], str | None]
    bare_keys: re.Pattern[str] | None = None  # of keys without quotes
    verbatim: bool = False  # it is JSON: white space and what is cut off stay as they are
    trailing_commas: bool = False


class _Next(Enum):
    """What may come next within a value."""

    VALUE = auto()
    FIRST_VALUE = auto()  # or the array's end
    KEY = auto()
    FIRST_KEY = auto()  # or the object's end
    COLON = auto()
    COMMA = auto()  # or the end of the innermost array or object


def read_value(reading: Reading, dialect: Dialect, out: Out) -> Steps[None]:
    """Reads one value, after white space, and puts its JSON out as it comes.

    Raises NotACall at the first thing that cannot be part of a value, and where the text ends.
    """
    closers: list[str] = []  # of the arrays and objects that are open, innermost last
    state = _Next.VALUE
    while True:
        text, pos = reading.text, reading.pos
        match = _SPACE.match(text, pos)
        assert match is not None
        reading.pos = end = match.end()
        if dialect.verbatim and closers and end > pos:
            out(text[pos:end])
        if end == len(text):
            if not (yield from reading.more()):
                raise NotACall
            continue
        char = text[end]
        if state is _Next.COLON:
            if char != ":":
                raise NotACall
            reading.pos += 1
            out(":" if dialect.verbatim else ": ")
            state = _Next.VALUE
        elif closers and char == closers[-1] and _may_close(state, closers[-1], dialect):
            reading.pos += 1
            out("}" if closers.pop() == "}" else "]")
            state = _Next.COMMA
        elif state is _Next.COMMA:
            if char != ",":
                raise NotACall
            reading.pos += 1
            if dialect.verbatim:
                out(",")
            state = _Next.KEY if closers[-1] == "}" else _Next.VALUE
            if not dialect.verbatim:  # a comma that turns out to be trailing must not be out
                yield from reading.space()
                if (yield from reading.peek()) not in ("", closers[-1]):
                    out(", ")
        elif state in (_Next.KEY, _Next.FIRST_KEY):
            yield from _read_key(reading, dialect, out)
            state = _Next.COLON
        elif char == "{" or char in dialect.brackets:
            if len(closers) == MAX_DEPTH:
                raise NotACall
            reading.pos += 1
            out("{" if char == "{" else "[")
            closers.append("}" if char == "{" else dialect.brackets[char])
            state = _Next.FIRST_KEY if char == "{" else _Next.FIRST_VALUE
        else:
            if not (yield from _read_string(reading, dialect, out)):
                yield from _read_scalar(reading, dialect, out)
            state = _Next.COMMA
        if not closers:
            return


def _may_close(state: _Next, closer: str, dialect: Dialect) -> bool:
    if state in (_Next.FIRST_VALUE, _Next.FIRST_KEY, _Next.COMMA):
        return True
    return dialect.trailing_commas and (state is _Next.KEY or closer != "}")


def _read_key(reading: Reading, dialect: Dialect, out: Out) -> Steps[None]:
    if (yield from _read_string(reading, dialect, out)):
        return
    word = "" if dialect.bare_keys is None else (yield from reading.word(dialect.bare_keys))
    if not word.strip() or reading.at_end:
        raise NotACall
    out(json.dumps(word.strip(), ensure_ascii=False))


def _read_scalar(reading: Reading, dialect: Dialect, out: Out) -> Steps[None]:
    word = yield from reading.word(dialect.word)
    if word and reading.at_end:  # it might have gone on
        out(word if dialect.verbatim else "")
        raise NotACall
    value = dialect.scalar(word)
    if value is None:
        reading.pos -= len(word)
        raise NotACall
    out(value)


def _read_string(reading: Reading, dialect: Dialect, out: Out) -> Steps[bool]:
    """Reads a string, if one comes next, and puts it out as JSON's."""
    if not any(opening[0] == reading.text[reading.pos] for opening in dialect.quotes):
        return False
    opening = yield from reading.take(*dialect.quotes)
    if not opening:
        if reading.cut_off(dialect.quotes):
            reading.pos = len(reading.text)
            raise NotACall
        return False
    out('"')
    yield from read_string_rest(reading, dialect, dialect.quotes[opening], out)
    out('"')
    return True


def read_string_rest(reading: Reading, dialect: Dialect, closing: str, out: Out) -> Steps[None]:
    """Reads what follows an opening quote, with the closing one; puts out what is between them."""
    while True:
        text, pos = reading.text, reading.pos
        match = dialect.plain.match(text, pos)
        if match is not None and match.end() > pos:
            out(match.group())
            reading.pos = pos = match.end()
        if pos < len(text):
            if text.startswith(closing, pos):
                reading.pos += len(closing)
                return
            if text[pos] == "\\" and dialect.escape is not None:
                escaped = dialect.escape(text, pos)
                if escaped is not None:
                    out(escaped[0])
                    reading.pos = escaped[1]
                    continue
            elif not closing.startswith(text[pos : pos + len(closing)]):
                out(json_escaped(text[pos]))
                reading.pos += 1
                continue
        if not (yield from reading.more()):
            reading.pos = len(reading.text)  # half an escape or closing says nothing
            raise NotACall


def json_escaped(text: str) -> str:
    """Returns the text as it stands within a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


_JSON_ESCAPE = re.compile(r'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})')
_JSON_ESCAPE_BEGUN = re.compile(r"\\(?:u[0-9a-fA-F]{0,3})?\Z")
_JSON_SCALAR = re.compile(
    r"(?:-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?|true|false|null)\Z"
)


def _json_escape(text: str, pos: int) -> tuple[str, int] | None:
    if match := _JSON_ESCAPE.match(text, pos):
        return match.group(), match.end()
    if len(text) - pos < 6 and _JSON_ESCAPE_BEGUN.match(text, pos):
        return None
    return "\\\\", pos + 1  # models forget to double the backslashes of regular expressions


def _json_scalar(word: str) -> str | None:
    return word if _JSON_SCALAR.match(word) else None


JSON = Dialect(
    quotes={'"': '"'},
    brackets={"[": "]"},
    plain=re.compile(r'(?:[^"\\\x00-\x1f]+|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))+'),
    escape=_json_escape,
    word=re.compile(r"[-+.\w]*"),
    scalar=_json_scalar,
    verbatim=True,
)

_PYTHON_ESCAPE = re.compile(
    r"\\(?:([\\'\"abfnrtv\n])|x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|([0-7]{1,3}))"
)
_PYTHON_ESCAPE_BEGUN = re.compile(
    r"\\(?:x[0-9a-fA-F]?|u[0-9a-fA-F]{0,3}|U[0-9a-fA-F]{0,7}|[0-7]{1,2})?\Z"
)
_PYTHON_CHARS = {
    "a": "\a",
    "b": "\b",
    "f": "\f",
    "n": "\n",
    "r": "\r",
    "t": "\t",
    "v": "\v",
    "\n": "",
}
_PYTHON_NUMBER = re.compile(
    r"[-+]?(?:[0-9](?:_?[0-9])*)?(\.(?:[0-9](?:_?[0-9])*)?)?([eE][-+]?[0-9](?:_?[0-9])*)?\Z"
)
_PYTHON_WORDS = {
    "True": "true",
    "False": "false",
    "None": "null",
    "true": "true",
    "false": "false",
    "null": "null",
}


def _python_escape(text: str, pos: int) -> tuple[str, int] | None:
    if len(text) - pos < 10 and _PYTHON_ESCAPE_BEGUN.match(text, pos):
        return None  # more digits may follow
    match = _PYTHON_ESCAPE.match(text, pos)
    if match is None:
        return "\\\\", pos + 1  # as in Python, the backslash of an unknown escape stays
    char, two, four, eight, octal = match.groups()
    if char is not None:
        return json_escaped(_PYTHON_CHARS.get(char, char)), match.end()
    if four is not None:
        return f"\\u{four}", match.end()  # perhaps half of a pair
    code = int(octal, 8) if octal is not None else int(two or eight, 16)
    if code > 0x10FFFF:
        raise NotACall
    return json.dumps(chr(code))[1:-1], match.end()


def _python_scalar(word: str) -> str | None:
    if word in _PYTHON_WORDS:
        return _PYTHON_WORDS[word]
    match = _PYTHON_NUMBER.match(word)
    if match is None or not any(char.isdigit() for char in word):
        return None
    try:
        if match.group(1) is None and match.group(2) is None:
            return str(int(word))
        return json.dumps(float(word), allow_nan=False)
    except ValueError:  # infinite
        return None


PYTHON = Dialect(
    quotes={'"""': '"""', "'''": "'''", '"': '"', "'": "'"},
    brackets={"[": "]", "(": ")"},
    plain=re.compile(r"""[^"'\\\x00-\x1f]+"""),
    escape=_python_escape,
    word=re.compile(r"[-+.\w]*"),
    scalar=_python_scalar,
    bare_keys=re.compile(r"[-+.\w]*"),
    trailing_commas=True,
)
