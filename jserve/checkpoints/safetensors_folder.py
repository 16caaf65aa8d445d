"""Tensors of a Hugging Face folder: safetensors, whole or in shards with an index. No JAX."""

import json
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jserve.checkpoints.json_file import read_json
from jserve.checkpoints.tensor_source import TensorInfo
from jserve.core.errors import ConfigError

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
MAX_HEADER_BYTES = 100 << 20  # the safetensors library has the same limit
DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


@dataclass(frozen=True, slots=True)
class _Stored:
    """The place of one tensor."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file


class SafetensorsFolder:
    """A `TensorSource` over the safetensors files of a folder, mapped into memory."""

    def __init__(self, folder: str | Path) -> None:
        """Raises ConfigError naming the file and what is wrong; reads headers only."""
        self.path = Path(folder)
        self._maps: dict[Path, mmap.mmap] = {}
        self._stored: dict[str, _Stored] = {}
        index = self._index()
        files = sorted({self.path / file for file in index.values()}) or [self.path / WHOLE]
        for file in files:
            for name, stored in self._open(file).items():
                if name in self._stored:
                    raise ConfigError(f"{file}: tensor {name} is also in another shard")
                self._stored[name] = stored
        self._check_index(index)
        self._infos = {
            name: TensorInfo(stored.shape, stored.dtype) for name, stored in self._stored.items()
        }

    def tensors(self) -> dict[str, TensorInfo]:
        return self._infos

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows as a view of the mapped file in the stored type, not a copy."""
        stored = self._stored[name]
        dtype = DTYPES[stored.dtype]
        row = int(np.prod(stored.shape[1:], dtype=np.int64))
        offset = stored.offset + start * row * dtype.itemsize
        data = self._maps[stored.file]
        rows = np.frombuffer(data, dtype, (stop - start) * row, offset)
        return rows.reshape(stop - start, *stored.shape[1:])

    def _index(self) -> dict[str, str]:
        """The file of each tensor; empty if one file holds all."""
        path = self.path / INDEX
        if not path.is_file():
            if not (self.path / WHOLE).is_file():
                raise ConfigError(f"{self.path}: holds neither {WHOLE} nor {INDEX}")
            return {}
        weight_map = read_json(path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ConfigError(f"{path}: weight_map is missing or empty")
        for name, file in weight_map.items():
            if not isinstance(file, str) or Path(file).name != file:
                raise ConfigError(f"{path}: tensor {name} is said to be in {file!r}, no file name")
        return weight_map

    def _check_index(self, index: dict[str, str]) -> None:
        absent = [
            f"{name} (in {file})"
            for name, file in index.items()
            if name not in self._stored or self._stored[name].file.name != file
        ]
        if absent:
            raise ConfigError(
                f"{self.path / INDEX}: {len(absent)} tensors are not where it says: "
                + ", ".join(absent[:8])
            )

    def _open(self, path: Path) -> dict[str, _Stored]:
        try:
            with path.open("rb") as file:
                self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise ConfigError(f"{path}: is missing; {INDEX} names it") from None
        except (OSError, ValueError) as error:  # an empty file cannot be mapped
            raise ConfigError(f"{path}: cannot be read: {error}") from error
        data = self._maps[path]
        size = int.from_bytes(data[:8], "little")
        if len(data) < 8 or size > min(MAX_HEADER_BYTES, len(data) - 8):
            raise ConfigError(f"{path}: the safetensors header is truncated or corrupt")
        try:
            header = json.loads(data[8 : 8 + size])
        except ValueError as error:
            raise ConfigError(f"{path}: the safetensors header is corrupt: {error}") from error
        if not isinstance(header, dict):
            raise ConfigError(f"{path}: the safetensors header is corrupt: not an object")
        header.pop("__metadata__", None)
        return {
            name: _entry(path, name, entry, 8 + size, len(data)) for name, entry in header.items()
        }


def _entry(path: Path, name: str, entry: Any, start: int, file_bytes: int) -> _Stored:
    try:
        dtype, shape = str(entry["dtype"]), tuple(int(size) for size in entry["shape"])
        low, high = (int(offset) for offset in entry["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: tensor {name}: its header entry is corrupt") from error
    if dtype not in DTYPES:
        raise ConfigError(
            f"{path}: tensor {name} has the type {dtype}; supported are {sorted(DTYPES)}"
        )
    if min(shape, default=1) < 0 or low < 0:
        raise ConfigError(f"{path}: tensor {name}: its header entry is corrupt")
    if high - low != DTYPES[dtype].itemsize * int(np.prod(shape, dtype=object)):
        raise ConfigError(f"{path}: tensor {name}: {high - low} bytes do not fit shape {shape}")
    if start + high > file_bytes:
        raise ConfigError(
            f"{path}: tensor {name} ends at byte {start + high}, but the file has {file_bytes}: "
            "it is truncated"
        )
    return _Stored(path, dtype, shape, start + low)
