"""Compiled programs kept on disk, so that a second start compiles nothing.

An entry is only used by the very code, configuration and machine that made it: the key digests
all of them. `stored_program` says what is in one.
"""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import logging
import os
import secrets
import stat
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.experimental import serialize_executable
from jax.sharding import Mesh

import jserve
from jserve.core.private_path import why_not_ours, why_not_private
from jserve.engine.program.stored_program import StoredProgram, seal, unseal
from jserve.model.functional import Model

logger = logging.getLogger(__name__)

_SECRET_BYTES = 32
_TEMPORARY = ".tmp"


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
    # Each of several processes has devices of its own.
    return repr((*machine_traits(), jax.process_index()))


def machine_traits() -> tuple[object, ...]:
    """The part of `machine_key` that all processes of an engine share."""
    device = jax.devices()[0]
    return (
        jax.__version__,
        importlib.metadata.version("jaxlib"),
        importlib.metadata.version("flax"),
        device.platform,
        device.device_kind,
        device.client.platform_version,
        jax.device_count(),
        cpu_features(),
        num_usable_cores(),
        os.environ.get("XLA_FLAGS", ""),
    )


class ExecutableCache:
    """A folder of serialized executables. Safe for concurrent processes: files appear whole.

    A program is code, so folder and files must belong to this user and be writable by nobody else,
    and each entry is sealed with a secret that lies beside the folder, readable by this user alone.
    Else nothing is read or kept, and the log says why.
    """

    def __init__(self, folder: Path, key: str, devices: Sequence[Any]) -> None:
        """`devices` run the programs; a machine may have others."""
        self._folder = folder
        self._key = key
        self._devices = devices
        self._secret = self._open()

    def _open(self) -> bytes | None:
        """The secret of the folder, both made if need be; None where the cache is not used."""
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = self._folder.lstat()
            reason = why_not_ours(found) if stat.S_ISDIR(found.st_mode) else "it is no folder"
            if reason:
                raise PermissionError(f"{self._folder}: {reason}")
            secret = _read_secret(self._folder.with_name(f"{self._folder.name}.secret"))
        except OSError as error:
            logger.warning(
                "the cache of compiled programs is not used, so every start compiles: %s; "
                "use a folder of your own that others cannot write (chmod go-w)",
                error,
            )
            return None
        _remove_abandoned(self._folder)
        return secret

    def _path(self, name: str) -> Path:
        digest = hashlib.sha256(f"{self._key}\n{name}".encode()).hexdigest()[:32]
        return self._folder / f"{digest}.jaxexec"

    def load(self, name: str) -> jax.stages.Compiled | None:
        """The program `name`, or None when it was never stored or cannot be read."""
        path = self._path(name)
        if self._secret is None or not path.is_file():
            return None
        try:
            stored = unseal(_read_ours(path, why_not_ours), self._secret, path.name)
            return serialize_executable.deserialize_and_load(
                *stored, execution_devices=self._devices
            )
        except Exception as error:  # JAX can raise anything
            logger.warning("compiled program %s is unreadable and is made again: %s", name, error)
            return None

    def store(self, name: str, compiled: jax.stages.Compiled) -> None:
        """Keeps a program. A full disk costs the next start its time, not this one its service."""
        if self._secret is None:
            return
        path = self._path(name)
        try:
            program = StoredProgram(*serialize_executable.serialize(compiled))
            _write_whole(path, seal(program, self._secret, path.name))
        except (OSError, TypeError) as error:
            logger.warning("compiled program %s was not kept: %s", name, error)


def _read_secret(path: Path) -> bytes:
    """The secret in `path`, which is made if it is not there. Raises OSError."""
    if not path.exists():
        with contextlib.suppress(FileExistsError):
            # Not by a rename: of two processes that make one, the first wins.
            _write_whole(path, secrets.token_bytes(_SECRET_BYTES), os.link)
    secret = _read_ours(path, why_not_private)
    if len(secret) != _SECRET_BYTES:
        raise PermissionError(f"{path}: it has {len(secret)} bytes, not {_SECRET_BYTES}; delete it")
    return secret


def _read_ours(path: Path, why_not: Callable[[os.stat_result], str | None]) -> bytes:
    """The bytes of a file, looked at after it was opened. Raises PermissionError for `why_not`."""
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC), "rb") as file:
        found = os.fstat(file.fileno())
        reason = why_not(found) if stat.S_ISREG(found.st_mode) else "it is no file"
        if reason:
            raise PermissionError(f"{path}: {reason}")
        return file.read()


def _write_whole(
    path: Path, content: bytes, put: Callable[[Path, Path], object] = os.rename
) -> None:
    """Makes `path`, for this user alone, in one step. Raises OSError, and leaves nothing then."""
    temporary = path.with_name(f".{secrets.token_hex(8)}{_TEMPORARY}")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # it is no abandoned one
            file.write(content)
            file.flush()
            put(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _remove_abandoned(folder: Path) -> None:
    """Removes half-written entries whose writers are gone: nobody holds their locks."""
    for path in folder.glob(f".*{_TEMPORARY}"):
        with contextlib.suppress(OSError), path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


class Loaded(NamedTuple):
    """A program that may be called."""

    call: jax.stages.Compiled
    cached: bool  # nothing was compiled


def open_cache(folder: Path, model: Model, mesh: Mesh) -> ExecutableCache:
    """The programs of `model` in `folder`, for the devices of `mesh`.

    Programs trace more of the model than shapes show, so its key is that of every program.
    """
    key = repr((*_traced(model, mesh), machine_key()))
    return ExecutableCache(folder, key, list(mesh.devices.flat))


def numerics_digest(model: Model, mesh: Mesh, *others: object) -> str:
    """A digest of what tokens depend on: of `model`, of its code, of the machine, and `others`.

    It is the same in all processes of an engine.
    """
    traits = (*_traced(model, mesh), machine_traits(), others)
    return hashlib.sha256(repr(traits).encode()).hexdigest()[:32]


def _traced(model: Model, mesh: Mesh) -> tuple[object, ...]:
    code = code_digest(traced_sources(Path(jserve.__file__).parent))
    return (*(model.spec, model.dtype, model.backend, model.quantization, model.mesh), mesh, code)


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
