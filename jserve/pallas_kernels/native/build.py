"""Builds the native CPU kernels: `python -m jserve.pallas_kernels.native.build`.

The library lies beside its sources, under a name that digests all it depends on: one that was
built from other sources, for another jaxlib or on another processor is never loaded.
"""

import ctypes
import functools
import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax

FOLDER = Path(__file__).parent
COMPILERS = ("c++", "g++", "clang++")
# The compiler splits vectors wider than the registers, and would warn of it.
FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-Wall", "-Wextra", "-Wno-psabi"),
    *("-ffp-contract=fast", "-fwrapv"),  # the code computes with the bits of floats as integers
)


class BuildError(Exception):
    """Raised if the library cannot be built here; the message says what to do."""


def library_path() -> Path:
    """Path of the library of these sources for this processor, built or not."""
    digest = hashlib.sha256(
        repr((FLAGS, _tuning(), importlib.metadata.version("jaxlib"), _processor())).encode()
    )
    for source in sorted((*FOLDER.glob("*.cc"), *FOLDER.glob("*.h"))):
        digest.update(source.name.encode())
        digest.update(source.read_bytes())
    return FOLDER / "build" / f"jserve_native-{digest.hexdigest()[:16]}.so"


def build() -> Path:
    """Builds the library unless it is there. Raises BuildError."""
    target = library_path()
    if target.is_file():
        return target
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        raise BuildError(f"no C++ compiler found (tried: {', '.join(COMPILERS)})")
    try:
        target.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            sources = sorted(FOLDER.glob("*.cc"))
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = list(pool.map(functools.partial(_compile, compiler, folder), sources))
            built = Path(folder) / target.name
            _run(compiler, "-shared", "-o", str(built), *objects)
            ctypes.CDLL(str(built))  # a library that is found can be loaded
            built.rename(target)
    except OSError as error:
        raise BuildError(f"{target.parent}: {error}") from error
    return target


def _compile(compiler: str, folder: str, source: Path) -> str:
    made = f"{folder}/{source.stem}.o"
    _run(
        compiler, *FLAGS, *_tuning(), "-isystem", jax.ffi.include_dir(), "-I", str(FOLDER),
        "-c", str(source), "-o", made,
    )  # fmt: skip
    return made


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stderr}")


def _tuning() -> tuple[str, ...]:
    arm = platform.machine().lower() in ("aarch64", "arm64")
    return ("-mcpu=native",) if arm else ("-march=native",)


@functools.cache
def _processor() -> str:
    """Identity of this processor, as far as code built for it depends on it."""
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.is_file() else []
    features = [line for line in lines if line.startswith(("flags", "Features"))][:1]
    return repr((platform.system(), platform.machine(), platform.processor(), features))


def main() -> int:
    """Builds the library and prints its path; returns 1 if that fails and XLA's code serves."""
    try:
        print(build())
    except BuildError as error:
        print(f"native CPU kernels were not built: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
