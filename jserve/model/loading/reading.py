"""Reads the parameters of a model from a `TensorSource`: matches names, reads in threads."""

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager

import jax.numpy as jnp
import numpy as np

from jserve.checkpoints.tensor_source import TensorSource
from jserve.core.errors import ConfigError
from jserve.model.params import ParamSpec

BLOCK_ELEMENTS = 1 << 20  # elements a thread reads at a time: 4 MiB of float32
_LISTED = 12  # tensors named in one message
_IGNORED = re.compile(r".*\.rotary_emb\.inv_freq|.*\.(masked_)?bias_mask")
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def found_specs(source: TensorSource, specs: Mapping[str, ParamSpec]) -> dict[str, ParamSpec]:
    """`specs`, adjusted where `source` already stores an expert stack as one tensor."""
    found = source.tensors()

    def whole(name: str, spec: ParamSpec) -> ParamSpec:
        if spec.encoding and not spec.encoding.at_load:
            name = name.rpartition(".")[0]  # the stack's name, without the part's
        if spec.stacked and name in found:
            return dataclasses.replace(spec, source=(name,), stacked=False)
        return spec

    return {name: whole(name, spec) for name, spec in specs.items()}


def check_tensors(source: TensorSource, specs: Mapping[str, ParamSpec]) -> None:
    """Raises one ConfigError naming every missing, surplus or misshapen tensor of `source`.

    A head beside a tied embedding is surplus only if their values differ.
    """
    found = source.tensors()
    wanted = {name for spec in specs.values() for name in spec.source}
    problems = [f"{name} is missing" for name in sorted(wanted - found.keys())]
    for name in sorted(found.keys() - wanted):
        tied_copy = name == _HEAD and _EMBEDDING in found and _equal(source, name, _EMBEDDING)
        if not _IGNORED.fullmatch(name) and not tied_copy:
            problems.append(f"{name} is not part of the model")
    for spec in specs.values():
        shapes = {name: found[name].shape for name in spec.source if name in found}
        problems += [
            f"{name} has shape {shape}, not {spec.source_shape}"
            for name, shape in shapes.items()
            if shape != spec.source_shape
        ]
    if problems:
        more = f"; and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise ConfigError(f"{source.path}: tensor " + "; ".join(problems[:_LISTED]) + more)


def read_param(source: TensorSource, spec: ParamSpec, pool: Executor) -> np.ndarray:
    """Reads a whole parameter into host memory; only blocks of rows exist twice.

    Raises ConfigError if it holds NaN or infinite values.
    """
    out = np.empty(spec.shape, jnp.dtype(spec.dtype))
    num_rows, row_elements = spec.source_shape[0], max(1, int(np.prod(spec.source_shape[1:])))
    packed = spec.encoding.rows if spec.encoding else 1
    step = max(1, BLOCK_ELEMENTS // row_elements // packed) * packed

    def read(block: tuple[str, np.ndarray, int]) -> None:
        name, part, start = block
        stop = min(start + step, num_rows)
        rows = _read_block(source, name, start, stop)
        encoded = spec.encoding.encode(rows) if spec.encoding else rows
        part[start // packed : stop // packed] = encoded

    parts = zip(spec.source, out if spec.stacked else out[None], strict=True)
    list(pool.map(read, [(*part, start) for part in parts for start in range(0, num_rows, step)]))
    return out


@contextmanager
def reading_threads() -> Iterator[Executor]:
    """Threads for `read_param`: NumPy, which dequantizes, releases the interpreter lock."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        yield pool


def _read_block(source: TensorSource, name: str, start: int, stop: int) -> np.ndarray:
    rows = source.read_rows(name, start, stop).astype(np.float32, copy=False)
    if not (np.isfinite(rows.min()) and np.isfinite(rows.max())):
        raise ConfigError(f"{source.path}: tensor {name} holds NaN or infinite values")
    return rows


def _equal(source: TensorSource, name: str, other: str) -> bool:
    infos = source.tensors()
    shape = infos[name].shape
    if infos[other].shape != shape:
        return False
    step = max(1, BLOCK_ELEMENTS // max(1, int(np.prod(shape[1:]))))
    return all(
        np.array_equal(
            source.read_rows(name, start, min(start + step, shape[0])),
            source.read_rows(other, start, min(start + step, shape[0])),
        )
        for start in range(0, shape[0], step)
    )
