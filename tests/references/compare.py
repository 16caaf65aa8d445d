"""Compares a folder of fixtures with one made anew: text and integers exactly, floats closely."""

import filecmp
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np

# Two builds of PyTorch order their sums differently; logits here are of the order of 1 to 30.
FLOAT32_TOLERANCE = 1e-3
FLOAT64_TOLERANCE = 1e-9
# Keys that say how far float32 is from float64: machine dependent, so only their size matters.
ERROR_KEYS = ("max_abs_error", "rms_error")
ERROR_RATIO = 3.0


def differences(committed: Path, made: Path) -> list[str]:
    """Differences, one line each; none when the fixtures are reproduced."""
    files = {str(p.relative_to(committed)) for p in committed.rglob("*") if p.is_file()}
    new = {str(p.relative_to(made)) for p in made.rglob("*") if p.is_file()}
    found = [f"{name}: not made any more" for name in sorted(files - new)]
    found += [f"{name}: not committed" for name in sorted(new - files)]
    for name in sorted(files & new):
        found += [f"{name}: {line}" for line in _file(committed / name, made / name)]
    return found


def _file(old: Path, new: Path) -> list[str]:
    if old.name.endswith(".npz"):
        return _arrays(old, new)
    if old.name.endswith((".json", ".json.gz")):
        return _values("", _read_json(old), _read_json(new))
    return [] if filecmp.cmp(old, new, shallow=False) else ["bytes differ"]


def _read_json(path: Path) -> Any:
    data = path.read_bytes()
    return json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)


def _arrays(old: Path, new: Path) -> list[str]:
    with np.load(old) as before, np.load(new) as after:
        if sorted(before) != sorted(after):
            return [f"arrays {sorted(before)} became {sorted(after)}"]
        return [line for key in before for line in _array(key, before[key], after[key])]


def _array(key: str, old: np.ndarray, new: np.ndarray) -> list[str]:
    if old.shape != new.shape or old.dtype != new.dtype:
        return [f"{key}: {old.dtype}{old.shape} became {new.dtype}{new.shape}"]
    if key.endswith(ERROR_KEYS):
        ratio = np.maximum(old / new, new / old).max()
        return [f"{key}: {old} became {new}"] if ratio > ERROR_RATIO else []
    if old.dtype.kind != "f":
        return [] if np.array_equal(old, new) else [f"{key}: values differ"]
    tolerance = FLOAT64_TOLERANCE if old.dtype == np.float64 else FLOAT32_TOLERANCE
    error = np.abs(old - new).max()
    return [] if error <= tolerance else [f"{key}: differs by {error:.1e}"]


def _values(path: str, old: Any, new: Any) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys():
        return [line for key in old for line in _values(f"{path}.{key}", old[key], new[key])]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [line for i, (a, b) in pairs for line in _values(f"{path}[{i}]", a, b)]
    if isinstance(old, float) and isinstance(new, float):
        return [] if abs(old - new) <= FLOAT32_TOLERANCE else [f"{path}: {old} became {new}"]
    return [] if old == new else [f"{path}: {str(old)[:60]!r} became {str(new)[:60]!r}"]
