"""Keywords of JSON Schema that stand for themselves: bounds, lengths, patterns, formats, types."""

import math
from collections.abc import Callable, Iterable
from decimal import Decimal
from fractions import Fraction
from typing import Any

from jserve.core.errors import RequestError
from jserve.grammar import formats
from jserve.grammar.patterns import PatternError, translate_pattern

Refused = Callable[[str, str], RequestError]  # makes the error of a fault and its path

TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
LENGTHS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")

_MAX_EXACT = 2**53  # larger integers are rounded by llguidance, as by most readers of JSON
_MAX_FRACTION = 10.0**15  # a larger float has no digits left after the point
_MAX_DECIMALS = 20
_EXACT_DIGITS = 14  # beside the first one: more are lost in floats
_MAX_PLACES = 12
_MAX_MULTIPLE = 10**6  # the automaton of multipleOf has so many states
_MAX_MULTIPLE_DECIMALS = 9
_MAX_COMMON_MULTIPLE = 2**31
_MAX_LENGTH = 10**7


def number(value: Any, where: str, name: str, refused: Refused) -> int | float:
    """Returns a number that llguidance reads exactly, an integer if it is whole."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise refused(f"{name} must be a number", where)
    if isinstance(value, float) and not math.isfinite(value):
        raise refused(f"{name} must be finite", where)
    if value == int(value):
        if abs(value) > _MAX_EXACT:
            raise refused(f"{name} is not supported beyond 2^53", where)
        return int(value)
    if abs(value) >= _MAX_FRACTION or _decimals(value) > _MAX_DECIMALS:
        raise refused(f"{name} {value} has more digits than are supported", where)
    return value


def bound(schema: dict[str, Any], name: str, where: str, refused: Refused) -> int | float | None:
    """Returns a bound; None for an exclusive one of draft 4 that is off."""
    value = schema[name]
    if not (isinstance(value, bool) and name.startswith("exclusive")):
        return number(value, where, name, refused)
    inclusive = "minimum" if name == "exclusiveMinimum" else "maximum"
    if value and inclusive not in schema:
        raise refused(f"{name}: true needs {inclusive}", where)
    return number(schema[inclusive], where, inclusive, refused) if value else None


def inclusive(value: int | float, direction: int, where: str, refused: Refused) -> int | float:
    """Returns the next number that is written above (1) or below (-1) an exclusive bound."""
    exact = Decimal(repr(value))
    digits = _EXACT_DIGITS - max(0, exact.adjusted())
    places = min(_MAX_PLACES, digits)
    if _decimals(float(value)) >= places > 0:
        raise refused(f"an exclusive bound of {value} has more digits than are supported", where)
    near = exact + direction * Decimal(1).scaleb(-max(0, places))
    return number(float(near), where, "an exclusive bound", refused)


def bounds_in(schema: Any) -> list[float]:
    """All numbers that any part of a schema gives as a bound."""
    found: list[float] = []
    waiting = [schema]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.values()
            given = (value.get(name) for name in BOUNDS)
            found += [it for it in given if isinstance(it, float) and math.isfinite(it)]
        elif isinstance(value, list):
            waiting += value
    return found


def may_be_written(value: float, direction: int, others: Iterable[float]) -> bool:
    """Whether llguidance may let an exclusive bound itself be written, as 1 in (1, 1.25].

    It does so where the bound farther from zero has the same digits and more.
    """
    if value * direction < 0:
        return False
    return any(int(it) == int(value) and it * direction > value * direction for it in others)


class Multiples:
    """The values of multipleOf in one schema, which may all meet in one number."""

    def __init__(self) -> None:
        self._seen: set[Fraction] = set()
        self._decimals = 0

    def check(self, value: Any, where: str, refused: Refused) -> int | float:
        """Returns the value, if its multiples can be told apart with those seen before."""
        value = number(value, where, "multipleOf", refused)
        if value <= 0:
            raise refused("multipleOf must be more than 0", where)
        exact = Fraction(repr(value))
        decimals = _decimals(float(value))
        if decimals > _MAX_MULTIPLE_DECIMALS or exact * 10**decimals > _MAX_MULTIPLE:
            raise refused(f"multipleOf {value} has more digits than are supported", where)
        self._seen.add(exact)
        self._decimals = max(self._decimals, decimals)
        if len(self._seen) > 1:
            common = math.lcm(*(int(it * 10**self._decimals) for it in self._seen))
            if common > _MAX_COMMON_MULTIPLE:
                raise refused("multipleOf: the common multiple of all is too large", where)
        return value


def length(value: Any, where: str, name: str, refused: Refused) -> int:
    """Returns a count, which may be written as 2.0."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value != int(value) or value < 0:
        raise refused(f"{name} must be a whole number, 0 or more", where)
    if value > _MAX_LENGTH:
        raise refused(f"{name} is supported up to {_MAX_LENGTH}", where)
    return int(value)


def types(value: Any, where: str, refused: Refused) -> str | list[str]:
    """Returns the type or types, each once."""
    names: list[Any] = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not names:
        raise refused("type must be a name or a list of names", where)
    for name in names:
        if name not in TYPES:
            known = ", ".join(TYPES)
            raise refused(f"type {str(name)[:40]!r} is unknown; types are {known}", where)
    if "number" in names:  # every integer is one
        names = [name for name in names if name != "integer"]
    names = list(dict.fromkeys(names))
    return names[0] if len(names) == 1 else names


def pattern(value: Any, where: str, name: str, refused: Refused) -> str:
    """Returns a pattern in llguidance's dialect."""
    if not isinstance(value, str):
        raise refused(f"{name} must be a string", where)
    try:
        return translate_pattern(value)
    except PatternError as error:
        raise refused(f"{name} {value[:100]!r}: {error}", where) from None


def text_format(schema: dict[str, Any], where: str, refused: Refused) -> dict[str, str]:
    """Returns the keyword that stands for `format`; none, where it says nothing of a text."""
    name = schema["format"]
    if not isinstance(name, str):
        raise refused("format must be a string", where)
    given = schema.get("type", "string")
    if "string" not in ([given] if isinstance(given, str) else given):
        return {}  # int32 and the like: how a number is stored
    if name in formats.HINTS:
        return {}
    if name in formats.NATIVE:
        return {"format": name}
    if name not in formats.PATTERNS:
        known = ", ".join(formats.SUPPORTED)
        raise refused(f"format {name[:40]!r} is not supported; supported are {known}", where)
    return {"pattern": formats.PATTERNS[name]}


def literal(value: Any, where: str, name: str, refused: Refused) -> Any:
    """Returns a value of const or enum that llguidance writes as it is."""
    match value:
        case bool() | None:
            return value
        case int() | float():
            return number(value, where, name, refused)
        case str():
            check_text(value, where, refused)
            if any((it < " " and it not in "\b\f\n\r\t") or it == "\x7f" for it in value):
                raise refused(f"{name} with control characters is not supported", where)
            return value
        case list():
            return [literal(it, f"{where}[{i}]", name, refused) for i, it in enumerate(value)]
        case _:
            for key in value:
                check_text(key, where, refused)
            return {key: literal(it, f"{where}.{key}", name, refused) for key, it in value.items()}


def check_text(value: str, where: str, refused: Refused) -> None:
    """Refuses text that no UTF-8 can carry."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise refused("a text holds a lone surrogate", where) from None


def _decimals(value: float) -> int:
    """Digits after the point of the shortest decimal number that reads as `value`."""
    mantissa, _, exponent = repr(value).partition("e")
    digits = mantissa.partition(".")[2].rstrip("0")
    return max(0, len(digits) - int(exponent or 0))
