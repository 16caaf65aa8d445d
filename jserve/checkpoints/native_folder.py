"""The native model folder on disk: its layout, its spec and its digests. No JAX.

manifest.json            format, dtype, tensors, and a digest of every other file
spec.json                ModelSpec
tokenizer.json, tokenizer_config.json, generation_config.json, chat_template.jinja
params/                  an Orbax checkpoint: one Zarr array per parameter, uncompressed
"""

import dataclasses
import enum
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from jserve.checkpoints.config import Dtype, Quantization
from jserve.checkpoints.json_file import read_json
from jserve.core.errors import ConfigError
from jserve.core.model_spec import ModelSpec, RopeScaling, RopeScalingKind

FORMAT = 1  # raised whenever older folders would be read wrongly
MANIFEST = "manifest.json"
SPEC = "spec.json"
PARAMS = "params"
DIGEST = "xxh3_128"  # 12 GB/s a core: against decay and truncation, not against malice
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Manifest:
    """A native folder's description of itself."""

    dtype: Dtype
    quantization: Quantization
    source: str  # the file or folder it was made from, for people
    tensors: dict[str, tuple[int, ...]]  # shape of every parameter
    files: dict[str, tuple[int, str]]  # path in the folder: (bytes, digest)


def is_native(folder: Path) -> bool:
    """Whether `folder` is a (complete) native model folder."""
    return (folder / MANIFEST).is_file()


def read_manifest(folder: Path) -> Manifest:
    """Reads the manifest. Raises ConfigError if it is corrupt or of another format."""
    path = folder / MANIFEST
    stored = read_json(path)
    if stored.get("format") != FORMAT:
        raise ConfigError(
            f"{path}: format {stored.get('format')!r} is not {FORMAT}; convert the model again"
        )
    try:
        return Manifest(
            dtype=Dtype(stored["dtype"]),
            quantization=Quantization(stored.get("quantization", "none")),
            source=str(stored["source"]),
            tensors={name: tuple(shape) for name, shape in stored["tensors"].items()},
            files={
                name: (int(entry["bytes"]), str(entry[DIGEST]))
                for name, entry in stored["files"].items()
            },
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: is corrupt: {error!r}; convert the model again") from error


def weights_digest(folder: Path) -> str:
    """Tells whether two native folders hold the same weights, wherever they were made."""
    # Other files hold times, so only the tensors' chunks are digested.
    chunks = {name: file for name, file in read_manifest(folder).files.items() if "/c/" in name}
    return xxhash.xxh3_128_hexdigest(repr(sorted(chunks.items())).encode())


def write_manifest(
    folder: Path,
    dtype: Dtype,
    quantization: Quantization,
    source: str,
    tensors: Mapping[str, tuple[int, ...]],
) -> None:
    """Digests every file of `folder` into its manifest; the last step of making one."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    digests = _digests(paths)
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, DIGEST: digest}
        for path, digest in zip(paths, digests, strict=True)
    }
    manifest = {
        "format": FORMAT,
        "dtype": dtype.value,
        "quantization": quantization.value,
        "source": source,
        "tensors": {name: list(shape) for name, shape in tensors.items()},
        "files": files,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def verify(folder: Path, manifest: Manifest) -> None:
    """Compares every file with its digest, in threads.

    Raises one ConfigError that names every missing, truncated or altered file; the folder of a
    file in params/ is the name of its tensor.
    """
    problems: list[str] = []
    present: list[str] = []
    for name, (num_bytes, _) in manifest.files.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != num_bytes:
            problems.append(f"{name} has {path.stat().st_size} bytes instead of {num_bytes}")
        else:
            present.append(name)
    digests = _digests([folder / name for name in present])
    for name, digest in zip(present, digests, strict=True):
        if digest != manifest.files[name][1]:
            problems.append(f"{name} is corrupt: its digest differs from {MANIFEST}")
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ConfigError(
            f"{folder}: {'; '.join(sorted(problems)[:8])}{more}. "
            "Delete the folder and convert the model again"
        )


def write_spec(folder: Path, spec: ModelSpec) -> None:
    text = json.dumps(dataclasses.asdict(spec), indent=1, default=_enum_value)
    (folder / SPEC).write_text(text + "\n", encoding="utf-8")


def read_spec(folder: Path) -> ModelSpec:
    """Reads spec.json. Raises ConfigError naming the file and the field."""
    path = folder / SPEC
    stored = read_json(path)
    try:
        if scaling := stored.get("rope_scaling"):
            kind = RopeScalingKind(scaling["kind"])
            stored["rope_scaling"] = RopeScaling(**{**scaling, "kind": kind})
        for name in ("local_layers", "sparse_layers", "eos_token_ids"):
            stored[name] = tuple(stored.get(name, ()))
        for name in ("local_rope_theta", "query_scale"):
            stored[name] = stored.get(name) or None  # 0 in folders of earlier versions
        return ModelSpec(**stored)
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: is corrupt: {error}; convert the model again") from error


def _enum_value(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    raise TypeError(f"{value!r} cannot be written as JSON")


def _digests(paths: list[Path]) -> list[str]:
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(_digest, paths))


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    block = bytearray(_BLOCK_BYTES)
    view = memoryview(block)
    with path.open("rb", buffering=0) as file:
        while num_bytes := file.readinto(block):
            digest.update(view[:num_bytes])
    return digest.hexdigest()
