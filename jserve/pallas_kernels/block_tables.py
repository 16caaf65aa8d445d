"""Tables of block sizes: JSON beside each kernel, a row for each kind of device."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

Row = TypeVar("Row")


def read_row(path: Path, name: str, make: Callable[..., Row], kind: str) -> Row:
    """Reads a row of the table at `path`; `kind` names its rows in the error.

    Raises ValueError if the table has no row `name`.
    """
    table = _read(path)
    if name not in table:
        raise ValueError(f"no {kind} {name!r}; the table has {', '.join(table)}")
    return make(**table[name])


@functools.cache
def _read(path: Path) -> dict[str, dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))
