"""Regular expressions of clients, which are those of ECMA-262, in the dialect of llguidance."""

import re

# Escapes that mean a position or an earlier group, neither of which has an automaton here.
_UNSUPPORTED_ESCAPES = {
    "b": "word boundaries (\\b)",
    "B": "word boundaries (\\B)",
    "k": "references to groups (\\k)",
    "c": "control letters (\\c)",
    **{digit: f"references to groups (\\{digit})" for digit in "123456789"},
}
# ASCII in ECMA-262, all of Unicode in llguidance's dialect: outside of a class, and inside.
_ASCII_CLASSES = {
    "d": ("[0-9]", "0-9"),
    "D": ("[^0-9]", "[^0-9]"),
    "w": ("[0-9A-Za-z_]", "0-9A-Za-z_"),
    "W": ("[^0-9A-Za-z_]", "[^0-9A-Za-z_]"),
}
_LOOKAROUND = re.compile(r"\(\?<?[=!]")
_FLAGS = re.compile(r"\(\?[a-zA-Z]*-?[a-zA-Z]*[:)]")
_NO_LOWER_BOUND = re.compile(r"\{,\d*\}")


class PatternError(ValueError):
    """A regular expression that no mask can follow exactly; the message says which part."""


def translate_pattern(pattern: str) -> str:
    """Returns a pattern of llguidance with the meaning that `pattern` has in ECMA-262.

    Raises PatternError for lookarounds, references and the like. Anchors are left to llguidance,
    which takes them at the ends only and refuses others.
    """
    try:
        pattern.encode()
    except UnicodeEncodeError:
        raise PatternError("it holds a lone surrogate") from None
    written: list[str] = []
    position, in_class = 0, False
    while position < len(pattern):
        if pattern[position] == "\\":
            piece = _escape(pattern, position, in_class)
        elif in_class:
            piece = _in_class(pattern, position)
            in_class = pattern[position] != "]"
        else:
            piece = _outside(pattern, position)
            in_class = pattern[position] == "["
        written.append(piece[1])
        position += piece[0]
    return "".join(written)


def regex_literal(pattern: str) -> str:
    """Returns a translated pattern as a regular expression of Lark."""
    escaped = re.sub(r"\\.|/|\n", _in_slashes, pattern, flags=re.DOTALL)
    return f"/{escaped}/" if escaped else "//"


def _in_slashes(match: re.Match[str]) -> str:
    return {"/": r"\/", "\n": r"\n", "\\\n": r"\n"}.get(match[0], match[0])


def _escape(pattern: str, start: int, in_class: bool) -> tuple[int, str]:
    """Returns the length of the escape at `start`, and what is written for it."""
    name = pattern[start + 1 : start + 2]
    if not name:
        raise PatternError("it ends with a lone \\")
    if ascii_class := _ASCII_CLASSES.get(name):
        return 2, ascii_class[in_class]
    if name == "b" and in_class:
        return 2, r"\x08"
    if fault := _UNSUPPORTED_ESCAPES.get(name):
        raise PatternError(f"{fault} are not supported")
    if name == "0":
        return 2, r"\x00"
    if name == "u" and re.match(r"[0-9a-fA-F]{4}", pattern[start + 2 :]):
        return 6, _code_point(pattern[start + 2 : start + 6])
    return 2, pattern[start : start + 2]


def _code_point(digits: str) -> str:
    if 0xD800 <= int(digits, 16) <= 0xDFFF:
        raise PatternError(f"half a character (\\u{digits}) is not supported")
    return rf"\u{digits}"


def _in_class(pattern: str, start: int) -> tuple[int, str]:
    # Inside of [...] these build sets in llguidance's dialect; in ECMA-262 they are characters.
    char = pattern[start]
    if char in "[&~":
        return 1, "\\" + char
    if pattern.startswith("--", start):
        raise PatternError("-- in a class of characters is not supported; write \\-")
    return 1, char


def _outside(pattern: str, start: int) -> tuple[int, str]:
    char = pattern[start]
    if char == "[":
        for empty in ("[]", "[^]"):
            if pattern.startswith(empty, start):
                raise PatternError(f"{empty} is not supported")
        return (2, "[^") if pattern.startswith("[^", start) else (1, "[")
    if char == "(":
        if _LOOKAROUND.match(pattern, start):
            raise PatternError("lookarounds ((?=, (?!, (?<=, (?<!) are not supported")
        flags = _FLAGS.match(pattern, start)
        if flags and flags[0] != "(?:":
            raise PatternError(f"flags ({flags[0]}) are not supported")
    if char == "{" and _NO_LOWER_BOUND.match(pattern, start):
        raise PatternError("{,n} is not supported; write {0,n}")
    return 1, char
