"""Typed reading of one JSON object: every field is asked for by name, the rest is refused.

A whole number may be written as a float, `4.0`: some clients have no other numbers.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, TypeVar

from jserve.core.errors import RequestError
from jserve.gateway.validation import MAX_EXACT

T = TypeVar("T")

MAX_NAMED = 20  # names of ignored fields that the answer's header shows
MAX_IGNORED = MAX_NAMED + 1  # of those that are kept; one more tells that there are more


def shown(value: object) -> str:
    """`value` as an error message shows it: JSON's type name, and the value when it is short."""
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case int() | float():
            return f"the number {value}"
        case str():
            return (
                f"the string {value!r}"
                if len(value) <= 40
                else f"a string of {len(value)} characters"
            )
        case list():
            return f"a list of {len(value)}"
        case _:
            return "an object"


def wrong_type(name: str, expected: str, value: object) -> RequestError:
    """The error for a field of the wrong JSON type."""
    return RequestError(f"{name} must be {expected}, not {shown(value)}", param=name)


def _same(value: object, neutral: object) -> bool:
    # 1 and true are equal in Python and differ in JSON.
    return value == neutral and isinstance(value, bool) is isinstance(neutral, bool)


def _cut(name: str) -> str:
    return name if len(name) <= 60 else name[:57] + "..."


def as_integer(value: Any) -> Any:
    """Returns `value`, as an integer if it is a whole number that was written as a float."""
    if type(value) is float and value.is_integer() and abs(value) <= MAX_EXACT:
        return int(value)
    return value


class Fields:
    """One JSON object, read field by field; null counts as absent. Owned by one parse.

    Every reader returns None for an absent field and raises RequestError, naming the field, for
    one of another type. `finish` refuses what was not read, or names it in `ignored`.
    """

    def __init__(
        self, data: Mapping[str, Any], where: str = "", ignored: list[str] | None = None
    ) -> None:
        """With `ignored`, unknown fields are added to it, up to `MAX_IGNORED`; none is refused."""
        self._left = dict(data)
        self._where = where
        self.ignored = ignored

    def name(self, key: str) -> str:
        """The path of `key` as errors name it, for example `stream_options.include_usage`."""
        return f"{self._where}.{key}" if self._where else key

    def raw(self, key: str) -> Any:
        """Returns the value unchecked."""
        return self._left.pop(key, None)

    def string(self, key: str) -> str | None:
        return self._typed(key, "a string", lambda value: type(value) is str)

    def boolean(self, key: str) -> bool | None:
        return self._typed(key, "true or false", lambda value: type(value) is bool)

    def integer(self, key: str) -> int | None:
        """Reads a whole number."""
        if key in self._left:
            self._left[key] = as_integer(self._left[key])
        return self._typed(key, "an integer", lambda value: type(value) is int)

    def number(self, key: str) -> float | None:
        value = self._typed(
            key,
            "a finite number",
            lambda value: type(value) is int or (type(value) is float and math.isfinite(value)),
        )
        return None if value is None else float(value)

    def mapping(self, key: str) -> dict[str, Any] | None:
        return self._typed(key, "an object", lambda value: type(value) is dict)

    def array(self, key: str) -> list[Any] | None:
        return self._typed(key, "a list", lambda value: type(value) is list)

    def integers(self, key: str) -> tuple[int, ...] | None:
        return self._sequence(key, "an integer", int)

    def strings(self, key: str) -> tuple[str, ...] | None:
        return self._sequence(key, "a string", str)

    def finish(self, unsupported: Mapping[str, Sequence[object]], known: Collection[str]) -> None:
        """Refuses every field that was not read; unknown ones may be ignored instead.

        Args:
            unsupported: fields of the API that are not served, with the values that ask for
                nothing and so are accepted; null always is.
            known: names to suggest for one that the API does not have.

        Raises:
            RequestError: names the first offending field.
        """
        for key, value in self._left.items():
            name = self.name(key)
            if key not in unsupported and self.ignored is not None:
                if len(self.ignored) < MAX_IGNORED:
                    self.ignored.append(_cut(name))
            elif key not in unsupported:
                near = get_close_matches(key[:60], known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                raise RequestError(f"unknown field {_cut(name)!r}{hint}", param=_cut(name))
            elif value is not None and not any(_same(value, it) for it in unsupported[key]):
                raise RequestError(f"{name}: not supported yet; leave it out", param=name)

    def _typed(self, key: str, expected: str, is_type: Callable[[Any], bool]) -> Any:
        value = self._left.pop(key, None)
        if value is not None and not is_type(value):
            raise wrong_type(self.name(key), expected, value)
        return value

    def _sequence(self, key: str, item: str, item_type: type[T]) -> tuple[T, ...] | None:
        values = self.array(key)
        if values is None:
            return None
        for index, value in enumerate(values):
            if type(value) is not item_type:
                raise wrong_type(f"{self.name(key)}[{index}]", item, value)
        return tuple(values)
