"""JSON files that hold an object. No JAX."""

import json
from pathlib import Path
from typing import Any

from jserve.core.errors import ConfigError


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file that holds an object. Raises ConfigError naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path}: is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: must hold a JSON object")
    return value


def read_optional_json(path: Path) -> dict[str, Any]:
    """Reads a file as `read_json` does; an empty object if there is none."""
    return read_json(path) if path.is_file() else {}
