"""Compiled programs kept on disk, so that a second start compiles nothing.

An entry is only used by the very code, configuration and machine that made it: the key digests
all of them. Entries are pickles; the folder must be as trusted as the code itself.
"""

import hashlib
import importlib.metadata
import logging
import os
import pickle
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import serialize_executable
from jax.sharding import Mesh

import jserve
from jserve.model.functional import Model

logger = logging.getLogger(__name__)

_DIGEST_BYTES = hashlib.sha256().digest_size  # at the start of an entry: the digest of the rest


def traced_sources(package: Path) -> list[Path]:
    """The rooms of the `jserve` folder `package` that a compiled program is made from.

    Whole rooms: a list of files would have to be remembered with every new one, and a stale
    program would be loaded where it was forgotten.
    """
    return [
        package / "core",
        package / "model",
        package / "pallas_kernels",
        package / "engine" / "program",
    ]


def code_digest(sources: Iterable[Path]) -> str:
    """A digest of the source files, and those of packages, that programs are traced from."""
    digest = hashlib.sha256()
    for source in sources:
        files = (file for file in source.rglob("*") if file.suffix in (".py", ".json", ".cc", ".h"))
        for file in sorted(files) if source.is_dir() else [source]:
            digest.update(str(file.relative_to(source.parent)).encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


def cpu_features() -> list[str]:
    """CPU model and flags: a program compiled for another CPU may crash or round differently."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.is_file() else []
    return [line for line in lines if line.startswith(("flags", "model name", "Features"))][:2]


def num_usable_cores() -> int:
    """Cores that this process may run on, which programs for CPU are partitioned for."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def machine_key() -> str:
    """Everything a compiled program depends on, except its shapes and its code."""
    device = jax.devices()[0]
    return repr(
        (
            jax.__version__,
            importlib.metadata.version("jaxlib"),
            importlib.metadata.version("flax"),
            device.platform,
            device.device_kind,
            device.client.platform_version,
            jax.device_count(),
            jax.process_index(),  # each of several processes has devices of its own
            cpu_features(),
            num_usable_cores(),
            os.environ.get("XLA_FLAGS", ""),
        )
    )


class ExecutableCache:
    """A folder of serialized executables. Safe for concurrent processes: files appear whole."""

    def __init__(self, folder: Path, key: str, devices: Sequence[Any]) -> None:
        """`devices` run the programs; a machine may have others."""
        self._folder = folder
        self._key = key
        self._devices = devices

    def _path(self, name: str) -> Path:
        digest = hashlib.sha256(f"{self._key}\n{name}".encode()).hexdigest()[:32]
        return self._folder / f"{digest}.jaxexec"

    def load(self, name: str) -> jax.stages.Compiled | None:
        """The program `name`, or None when it was never stored or cannot be read."""
        path = self._path(name)
        if not path.is_file():
            return None
        try:
            stored = path.read_bytes()
            digest, entry = stored[:_DIGEST_BYTES], stored[_DIGEST_BYTES:]
            if hashlib.sha256(entry).digest() != digest:
                raise ValueError("its bytes have changed")  # XLA would crash on them, or worse
            payload, in_tree, out_tree = pickle.loads(entry)  # noqa: S301 - see above
            return serialize_executable.deserialize_and_load(
                payload, in_tree, out_tree, execution_devices=self._devices
            )
        except Exception as error:  # a damaged pickle can raise anything
            logger.warning("compiled program %s is unreadable and is made again: %s", name, error)
            return None

    def store(self, name: str, compiled: jax.stages.Compiled) -> None:
        """Keeps a program. A full disk costs the next start its time, not this one its service."""
        entry = pickle.dumps(serialize_executable.serialize(compiled))
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self._folder, delete=False) as file:
                try:
                    file.write(hashlib.sha256(entry).digest() + entry)
                    file.flush()
                    Path(file.name).rename(self._path(name))
                except OSError:
                    Path(file.name).unlink(missing_ok=True)
                    raise
        except OSError as error:
            logger.warning("compiled program %s was not kept: %s", name, error)


class Loaded(NamedTuple):
    """A program that may be called."""

    call: jax.stages.Compiled
    cached: bool  # nothing was compiled


def open_cache(folder: Path, model: Model, mesh: Mesh) -> ExecutableCache:
    """The programs of `model` in `folder`, for the devices of `mesh`.

    Programs trace more of the model than shapes show, so its key is that of every program.
    """
    traced = (model.spec, model.dtype, model.backend, model.quantization, model.mesh)
    code = code_digest(traced_sources(Path(jserve.__file__).parent))
    key = repr((*traced, mesh, code, machine_key()))
    return ExecutableCache(folder, key, list(mesh.devices.flat))


def load_or_compile(
    cache: ExecutableCache | None, name: str, lower: Callable[[], jax.stages.Lowered]
) -> Loaded:
    """The program `name` from the cache, or compiled and kept there.

    `name` tells the kind of program and all that `lower` depends on beside the model.
    """
    found = cache.load(name) if cache else None
    if found is not None:
        return Loaded(found, cached=True)
    made = lower().compile()
    if cache:
        cache.store(name, made)
    return Loaded(made, cached=False)
