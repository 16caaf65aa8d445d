"""The whole config of a server, composed of each package's own; loading it and overriding it."""

import dataclasses
import enum
import re
import runpy
import traceback
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jserve.cache.config import CacheConfig
from jserve.checkpoints.config import ModelConfig
from jserve.control.config import ControlConfig
from jserve.core.errors import ConfigError
from jserve.core.field_types import check_types, is_secret, type_name
from jserve.core.logs import LogConfig
from jserve.engine.config import EngineConfig, PlatformConfig
from jserve.gateway.config import GatewayConfig
from jserve.scheduler.config import SchedulerConfig

# Fields of earlier versions begin with the first; the same fields now begin with the second.
_RENAMED_PREFIXES = {"window_": "decode_"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """Everything that the launcher needs; each package is handed its own part only."""

    model: ModelConfig
    platform: PlatformConfig = field(default_factory=PlatformConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    gateway: GatewayConfig = field(default_factory=GatewayConfig)
    control: ControlConfig = field(default_factory=ControlConfig)
    log: LogConfig = field(default_factory=LogConfig)

    @property
    def drain_s(self) -> float:
        """Seconds that what runs may take after SIGTERM: the gateway drains, then the engine."""
        return self.gateway.drain_s + self.engine.drain_timeout_s


def load(path: str, overrides: Sequence[str] = ()) -> ServeConfig:
    """Runs `get_config()` of a Python file and applies overrides like `engine.num_slots=8`.

    `path` may end in `:variant`, which is then the argument of get_config. Raises ConfigError
    naming the file, line, field and remedy when anything is wrong.
    """
    path, colon, variant = path.partition(":")
    if not Path(path).is_file():
        raise ConfigError(f"--config: there is no file {path}")
    try:
        get_config = runpy.run_path(path).get("get_config")
        config = None if get_config is None else get_config(*([variant] if colon else []))
    except Exception as error:
        raise ConfigError(f"{_place(path, error)}: {_describe(error)}") from error
    if get_config is None:
        raise ConfigError(f"{path} defines no get_config()")
    if not isinstance(config, ServeConfig):
        raise ConfigError(f"{path}: get_config() returned {type(config).__name__}, not ServeConfig")
    check_types(config)
    config = override(config, overrides)
    check_types(config)
    return config


def override(config: ServeConfig, overrides: Sequence[str]) -> ServeConfig:
    """A copy of `config` with every `section.field=value` applied in order."""
    for assignment in overrides:
        name, equals, text = assignment.partition("=")
        if not equals:
            # What follows the name, after a space or a colon, may be a key.
            name = re.split(r"[^\w.]", assignment.strip())[0]
            raise ConfigError(f"--set {name}: write section.field=value")
        config = _replace(config, name.strip().split("."), text.strip(), name.strip())
    return config


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every leaf by its dotted name, in order of declaration: what `--set` can reach."""
    leaves: dict[str, Any] = {}
    for item in dataclasses.fields(config):
        value = getattr(config, item.name)
        if dataclasses.is_dataclass(value):
            leaves |= flatten(value, f"{prefix}{item.name}.")
        else:
            leaves[prefix + item.name] = value
    return leaves


def _replace(config: Any, path: list[str], text: str, full_name: str) -> Any:
    names = [item.name for item in dataclasses.fields(config)]
    if path[0] not in names:
        raise ConfigError(
            f"--set {full_name}: {type(config).__name__} has no field {path[0]!r}; "
            f"{_renamed(path[0], names)}it has {', '.join(names)}"
        )
    value = getattr(config, path[0])
    if len(path) > 1:
        if not dataclasses.is_dataclass(value):
            raise ConfigError(f"--set {full_name}: {path[0]} has no fields")
        return dataclasses.replace(config, **{path[0]: _replace(value, path[1:], text, full_name)})
    hint = typing.get_type_hints(type(config))[path[0]]
    if dataclasses.is_dataclass(hint):
        fields = ", ".join(f"{full_name}.{item.name}" for item in dataclasses.fields(value))
        raise ConfigError(f"--set {full_name}: name one of its fields: {fields}")
    try:
        parsed = _parse(text, hint)
    except ValueError as error:
        if is_secret(hint):
            raise ConfigError(f"--set {full_name}: {error}") from None
        raise ConfigError(
            f"--set {full_name}={text}: not of type {type_name(hint)}: {error}"
        ) from None
    return dataclasses.replace(config, **{path[0]: parsed})


def _parse(text: str, hint: Any) -> Any:
    """`text` as a value of type `hint`. Raises ValueError."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if text.lower() == "none" and type(None) in args:
            return None
        return _parse(text, next(arg for arg in args if arg is not type(None)))
    if origin is tuple:
        items = _items(text)
        if is_secret(hint) and not all(items or [text]):
            raise ValueError("a key is empty; is a variable unset? Write () for no keys")
        items = [item for item in items if item]
        if args[-1] is not Ellipsis and len(items) != len(args):
            raise ValueError(f"{len(args)} items are needed")
        kinds = [args[0]] * len(items) if args[-1] is Ellipsis else args
        return tuple(_parse(item, kind) for item, kind in zip(items, kinds, strict=True))
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError("write true or false")
        return text.lower() == "true"
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        try:
            return hint(text)
        except ValueError:
            raise ValueError(f"one of {', '.join(str(kind.value) for kind in hint)}") from None
    if hint is int:
        return int(text, 0)
    if hint in (float, str, Path):
        return hint(text)
    raise ValueError("set it in the config file instead")


def _items(text: str) -> list[str]:
    """The items of `a,b`, `(a, b)` or `('a', 'b')`; empty ones, too, but not after a last comma."""
    inner = text.strip("()[]")
    items = [item.strip() for item in inner.split(",")] if inner.strip() else []
    if inner != text and items and not items[-1]:
        items.pop()
    quoted = re.compile(r"""(['"])(.*)\1""")
    return [match[2] if (match := quoted.fullmatch(item)) else item for item in items]


def _place(path: str, error: Exception) -> str:
    """Where in the config file `error` was raised, as path:line if the line is known."""
    if isinstance(error, SyntaxError) and error.filename == path:
        return f"{path}:{error.lineno}"
    frames = traceback.walk_tb(error.__traceback__)
    lines = [line for frame, line in frames if frame.f_code.co_filename == path]
    return f"{path}:{lines[-1]}" if lines else path


def _describe(error: Exception) -> str:
    """Says what a config file did wrong, and the new name of a field of an earlier version."""
    if isinstance(error, ConfigError):
        return str(error)
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    if frame.f_code.co_name == "__setattr__":  # a frozen dataclass; its own words may mislead
        owner, name = frame.f_locals.get("self"), frame.f_locals.get("name")
        if dataclasses.is_dataclass(owner) and isinstance(name, str):
            return _describe_field(owner, name) or (
                f"{type(owner).__name__}.{name} cannot be assigned; give it to the constructor "
                "or to dataclasses.replace"
            )
    if (
        isinstance(error, AttributeError)
        and dataclasses.is_dataclass(error.obj)
        and (described := _describe_field(error.obj, error.name or ""))
    ):
        return described
    if isinstance(error, TypeError) and (hint := _fields_hint(str(error))):
        return f"{error}{hint}"  # an unknown field, in a constructor's own words
    text = error.msg if isinstance(error, SyntaxError) else error
    return f"{type(error).__name__}: {text}"


def _describe_field(owner: Any, name: str) -> str:
    """Says which fields a dataclass has, if it has none called `name`; else an empty text."""
    names = [item.name for item in dataclasses.fields(owner)]
    if name in names:
        return ""
    kind = owner if isinstance(owner, type) else type(owner)
    return (
        f"{kind.__name__} has no field {name!r}; {_renamed(name, names)}"
        f"its fields are {', '.join(names)}"
    )


def _fields_hint(message: str) -> str:
    """The fields of the config class whose constructor complained in `message`."""
    for hint in (ServeConfig, *typing.get_type_hints(ServeConfig).values()):
        if f"{hint.__name__}.__init__()" in message:
            names = [item.name for item in dataclasses.fields(hint)]
            given = re.search(r"'(\w+)'", message)
            renamed = _renamed(given[1], names) if given else ""
            return f"; {renamed}its fields are {', '.join(names)}"
    return ""


def _renamed(name: str, names: Sequence[str]) -> str:
    """A remedy for a config of an earlier version: the new name of field `name`, if it has one."""
    for old, new in _RENAMED_PREFIXES.items():
        if name.startswith(old) and (renamed := new + name.removeprefix(old)) in names:
            return f"{name} is now called {renamed}; "
    return ""
