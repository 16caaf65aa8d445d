"""The native library: built where it can be, and never a reason not to start."""

import logging
import platform
import shutil
import subprocess
from pathlib import Path

import jax
import pytest

from jserve.pallas_kernels.native import build, library

_SOURCES = build.FOLDER
_CXX = shutil.which("g++") or shutil.which("c++") or shutil.which("clang++")
needs_compiler = pytest.mark.skipif(_CXX is None, reason="there is no C++ compiler")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the sources, with nothing built."""
    shutil.copytree(_SOURCES, tmp_path / "native", ignore=shutil.ignore_patterns("build"))
    monkeypatch.setattr(build, "FOLDER", tmp_path / "native")
    return tmp_path / "native"


@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="names x86 processors")
@pytest.mark.parametrize(
    "processor",
    [  # the widest vectors, beside those of this machine, which is built for
        pytest.param("x86-64", marks=pytest.mark.sweep),
        pytest.param("sandybridge", marks=pytest.mark.sweep),
        pytest.param("haswell", marks=pytest.mark.sweep),
        "skylake-avx512",
    ],
)
@pytest.mark.parametrize(
    "source",
    [  # the one that differs most between processors
        pytest.param(
            path,
            id=path.stem,
            marks=() if path.stem == "attention" else pytest.mark.sweep,
        )
        for path in sorted(_SOURCES.glob("*.cc"))
    ],
)
def test_compiles_for_any_processor(source: Path, processor: str, tmp_path: Path) -> None:
    assert _CXX is not None
    flags = [*build.FLAGS, "-Werror", "-O0", f"-march={processor}"]
    command = [_CXX, *flags, "-isystem", jax.ffi.include_dir(), "-c", str(source)]
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "object.o")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_no_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(folder))
    with pytest.raises(build.BuildError, match=r"no C\+\+ compiler found"):
        build.build()
    assert build.main() == 1


@needs_compiler
def test_the_words_of_the_compiler(folder: Path) -> None:
    for source in folder.glob("*.cc"):
        source.unlink()
    (folder / "fine.cc").write_text("int fine() { return 0; }")
    (folder / "broken.cc").write_text("this is no C++")
    with pytest.raises(build.BuildError, match=r"broken\.cc"):
        build.build()
    assert list((folder / "build").iterdir()) == []


def test_another_source_is_another_library(folder: Path) -> None:
    before = build.library_path()
    (folder / "simd.h").write_text("")
    assert build.library_path() != before


@pytest.mark.parametrize("content", [None, b"no library"])
def test_starts_without(
    folder: Path, content: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    if content is not None:
        (folder / "build").mkdir()
        build.library_path().write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert not library.is_loaded.__wrapped__()
    assert "python -m jserve.pallas_kernels.native.build" in caplog.text
