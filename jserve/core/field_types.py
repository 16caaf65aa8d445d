"""Whether the values of a config's fields are of their declared types."""

import dataclasses
import math
import types
import typing
from typing import Any

from jserve.core.errors import ConfigError
from jserve.core.secret import Secret


def check_types(config: Any, prefix: str = "") -> None:
    """Raises ConfigError when a value, at any depth, is not of its field's declared type.

    Limits and times that are not finite are refused, too: they would end the loop that uses them.
    """
    hints = typing.get_type_hints(config.__class__)
    for item in dataclasses.fields(config):
        name, value = prefix + item.name, getattr(config, item.name)
        if not _is_instance(value, hints[item.name]):
            shown = "<secret>" if is_secret(hints[item.name]) else repr(value)
            raise ConfigError(
                f"{name} is {shown}, but must be of type {type_name(hints[item.name])}"
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{name} is {value}; it must be finite")
        if dataclasses.is_dataclass(value):
            check_types(value, f"{name}.")


def type_name(hint: Any) -> str:
    """A declared type as its file writes it."""
    return hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)


def is_secret(hint: Any) -> bool:
    """Whether values of a declared type must not be shown."""
    return hint is Secret or any(map(is_secret, typing.get_args(hint)))


def _is_instance(value: Any, hint: Any) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(_is_instance(value, arg) for arg in args)
    if origin is typing.Literal:
        return value in args
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        items = typing.cast(tuple[Any, ...], value)
        if args[-1] is Ellipsis:
            return all(_is_instance(item, args[0]) for item in items)
        return len(items) == len(args) and all(map(_is_instance, items, args))
    if origin is not None:
        return isinstance(value, origin)
    if hint is Any:
        return True
    if isinstance(value, bool):  # a bool is an int to Python, but a mistake in a config
        return hint is bool
    if hint is float:
        return isinstance(value, int | float)
    return isinstance(value, hint)
