"""The native checkpoint: written tensor by tensor, restored straight into sharded arrays."""

import asyncio
import gc
import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jserve.checkpoints.config import Dtype
from jserve.checkpoints.native_folder import (
    PARAMS,
    is_native,
    read_manifest,
    verify,
    write_manifest,
    write_spec,
)
from jserve.checkpoints.temporary import temporary_folder
from jserve.checkpoints.tensor_source import Progress, TensorSource
from jserve.checkpoints.text_assets import TextAssets, save_text_assets
from jserve.core.errors import ConfigError
from jserve.model.functional import Model
from jserve.model.loading.reading import (
    check_tensors,
    found_specs,
    read_param,
    reading_threads,
)
from jserve.model.params import ParamSpec

# A stored chunk is read whole. Small enough that a device reads little beyond its shard, and above
# malloc's mmap threshold (32 MiB), so that buffers of reads go back to the system at once.
CHUNK_BYTES = 64 << 20
# Stored bytes being read at a time, unless one tensor alone is more.
READ_AHEAD_BYTES = 24 << 20
# Bytes being written while more is read, unless one tensor alone is more.
WRITE_BEHIND_BYTES = 64 << 20


def write_native(
    folder: Path,
    model: Model,
    source: TensorSource,
    assets: TextAssets,
    progress: Progress,
) -> None:
    """Makes a native folder of `source`, all or nothing, one tensor in host memory at a time.

    Must not run in a process that `jax.distributed` joined with others: Orbax lets only one of
    them write.
    Raises ConfigError, before writing, if the tensors are not those of `model`. A folder that
    another process completed meanwhile is left as it is.
    """
    specs = found_specs(source, model.param_specs())
    assert all(spec.shape == spec.stored_shape for spec in specs.values()), model.backend
    check_tensors(source, specs)
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary_folder(folder.parent, folder.name) as temporary:
            _save_params(temporary / PARAMS, source, specs, progress)
            write_spec(temporary, model.spec)
            save_text_assets(temporary, assets)
            shapes = {name: spec.shape for name, spec in specs.items()}
            kind = (Dtype(model.dtype.name), model.quantization)
            write_manifest(temporary, *kind, str(source.path), shapes)
            _move(temporary, folder)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written: {error}") from error


def restore_native(
    folder: Path, specs: Mapping[str, ParamSpec], shardings: Mapping[str, Sharding]
) -> dict[str, jax.Array]:
    """Reads the parameters of a native folder onto their devices, cast to the specs' dtypes.

    Every process keeps only what its own devices hold. Raises ConfigError if a file differs from
    its digest or a tensor from its spec, before anything is read.
    """
    manifest = read_manifest(folder)
    shapes = {name: spec.stored_shape for name, spec in specs.items()}
    if manifest.tensors != shapes:
        differing = sorted(
            name
            for name in manifest.tensors.keys() | shapes.keys()
            if manifest.tensors.get(name) != shapes.get(name)
        )
        raise ConfigError(
            f"{folder}: tensors differ from those of the model: {', '.join(differing[:12])}"
        )
    verify(folder, manifest)
    stored_bytes = {name: _stored_bytes(spec, manifest.dtype.value) for name, spec in specs.items()}
    large = [name for name, num_bytes in stored_bytes.items() if num_bytes > READ_AHEAD_BYTES]
    small = [name for name in specs if name not in set(large)]
    restored: dict[str, jax.Array] = {}
    # Large tensors first, one after the other, while memory is still free; then many at once.
    for names in (large, small):
        if names:
            limit = max(READ_AHEAD_BYTES, *(stored_bytes[name] for name in names)) + 1
            restored |= _restore(folder, {name: specs[name] for name in names}, shardings, limit)
            if names is large:
                gc.collect()  # Orbax's tasks leave cycles that hold on to host buffers
    return {name: restored[name] for name in specs}


def _restore(
    folder: Path,
    specs: Mapping[str, ParamSpec],
    shardings: Mapping[str, Sharding],
    read_ahead_bytes: int,
) -> dict[str, jax.Array]:
    """Restores some tensors of the checkpoint, reading at most `read_ahead_bytes` at a time."""
    # Each of several processes reads what its devices hold, and waits for no other.
    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(), active_processes={jax.process_index()}
    )
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=False,
        use_zarr3=True,
        restore_concurrent_gb=_gigabytes(read_ahead_bytes),
        multiprocessing_options=alone,
    )
    restore_args = {
        name: ocp.ArrayRestoreArgs(
            restore_type=jax.Array,
            sharding=_stored_sharding(shardings[name], spec),
            global_shape=spec.stored_shape,
            dtype=spec.dtype,
        )
        for name, spec in specs.items()
    }
    with _quiet(), ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
        restored: dict[str, jax.Array] = checkpointer.restore(
            folder.resolve() / PARAMS,
            args=ocp.args.PyTreeRestore(
                item=dict.fromkeys(specs, 0), restore_args=restore_args, partial_restore=True
            ),
        )
    jax.block_until_ready(restored)

    def arrange(name: str) -> None:
        arranged = specs[name].from_stored(np.asarray(restored.pop(name)))
        restored[name] = jax.device_put(arranged, shardings[name])

    made = {name: spec.encoding for name, spec in specs.items() if spec.encoding}
    here = [name for name, how in made.items() if how.at_load and not how.order]
    with reading_threads() as pool:
        list(pool.map(arrange, here))
    for name, how in made.items():
        if how.order:
            # Transposed on the parameter's devices, some of which may be other processes'.
            restored[name] = _transposing(how.order, shardings[name])(restored.pop(name))
    return restored


@cache  # compiled once per shape, not once per layer
def _transposing(order: tuple[int, ...], sharding: Sharding) -> Callable[[jax.Array], jax.Array]:
    """A function that puts the dimensions of a stored array where the parameter has them."""
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return jax.jit(lambda stored: stored.transpose(inverse), out_shardings=sharding)


def _stored_sharding(sharding: Sharding, spec: ParamSpec) -> Sharding:
    """The sharding of a parameter's stored array, with fewer or reordered dimensions."""
    is_as_stored = spec.stored_order == tuple(range(len(spec.shape)))
    if isinstance(sharding, NamedSharding) and not is_as_stored:
        axes = [*sharding.spec, *[None] * len(spec.shape)]
        split = PartitionSpec(*(axes[dimension] for dimension in spec.stored_order))
        return NamedSharding(sharding.mesh, split)
    return sharding


@dataclass(frozen=True, slots=True)
class _Pending:
    """A parameter that is read when Orbax gets to it."""

    source: TensorSource
    spec: ParamSpec
    pool: Executor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spec.shape

    @property
    def dtype(self) -> np.dtype:
        return jnp.dtype(self.spec.dtype)

    def read(self) -> np.ndarray:
        return read_param(self.source, self.spec, self.pool)


class _PendingHandler(ocp.type_handlers.NumpyHandler):
    """Saves each `_Pending` leaf as an array, reading ahead of the disk."""

    def __init__(self, progress: Progress, sizes: Sequence[int]) -> None:
        super().__init__(deepcopy_host_arrays=False)
        self._progress = progress
        self._total_bytes = sum(sizes)
        self._limit_bytes = max(WRITE_BEHIND_BYTES, *sizes)

    async def serialize(
        self,
        values: Sequence[Any],
        infos: Sequence[Any],
        args: Sequence[ocp.SaveArgs] | None = None,
    ) -> Sequence[Any]:
        writing: deque[tuple[int, Sequence[Any]]] = deque()
        writing_bytes = done_bytes = 0
        try:
            for value, info, save_args in zip(values, infos, args or [], strict=True):
                num_bytes = _num_bytes(value.spec)
                while writing and writing_bytes + num_bytes > self._limit_bytes:
                    writing_bytes -= await _written(writing)
                array = value.read()
                writing.append((num_bytes, await super().serialize([array], [info], [save_args])))
                del array
                writing_bytes += num_bytes
                done_bytes += num_bytes
                self._progress(done_bytes, self._total_bytes)
        finally:  # nothing is written any more once this returns or raises
            while writing:
                await _written(writing)
        return []


async def _written(writing: deque[tuple[int, Sequence[Any]]]) -> int:
    """Waits for the oldest write and returns its bytes."""
    num_bytes, futures = writing.popleft()
    for future in futures:
        await asyncio.to_thread(future.result)
    return num_bytes


def _save_params(
    path: Path, source: TensorSource, specs: Mapping[str, ParamSpec], progress: Progress
) -> None:
    sizes = [_num_bytes(spec) for spec in specs.values()]
    registry = ocp.type_handlers.create_type_handler_registry(
        (_Pending, _PendingHandler(progress, sizes)),
        (jax.Array, ocp.type_handlers.ArrayHandler()),
    )
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=False, use_zarr3=True, use_compression=False, type_handler_registry=registry
    )
    with reading_threads() as pool, _quiet(), ocp.Checkpointer(handler) as checkpointer:
        tree = {name: _Pending(source, spec, pool) for name, spec in specs.items()}
        save_args = {name: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES) for name in specs}
        checkpointer.save(path.resolve(), args=ocp.args.PyTreeSave(tree, save_args=save_args))


def _stored_bytes(spec: ParamSpec, dtype: str) -> int:
    """Bytes of a parameter in a folder of `dtype`; codes and scales have their own types."""
    quantized = spec.encoding and not spec.encoding.at_load
    itemsize = jnp.dtype(spec.dtype if quantized else dtype).itemsize
    return int(np.prod(spec.stored_shape)) * itemsize


def _num_bytes(spec: ParamSpec) -> int:
    return int(np.prod(spec.shape)) * jnp.dtype(spec.dtype).itemsize


def _move(temporary: Path, folder: Path) -> None:
    try:
        temporary.rename(folder)
    except OSError:
        if not is_native(folder):
            raise


def _gigabytes(num_bytes: int) -> Any:
    """Orbax declares whole gigabytes but counts bytes."""
    return num_bytes / 10**9


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences Orbax, which logs every step, and warns when OCDBT is off."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
