"""Programs on disk are code: nothing that this user did not write is parsed."""

import collections
import fcntl
import hashlib
import json
import os
import pickle
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jserve.engine.program import executable_cache, stored_program
from jserve.engine.program.executable_cache import ExecutableCache, load_or_compile
from jserve.engine.program.state import DeviceState
from jserve.engine.program.stored_program import StoredProgram, seal, unseal

SECRET = b"s" * 32


def _lowered() -> jax.stages.Lowered:
    return jax.jit(lambda x: x + 1).lower(jnp.int32(1))


def _open(folder: Path) -> ExecutableCache:
    return ExecutableCache(folder, "key", jax.devices()[:1])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A cache with one program, `program`."""
    folder = tmp_path / "programs"
    assert not load_or_compile(_open(folder), "program", _lowered).cached
    return folder


@pytest.fixture
def entry(folder: Path) -> Path:
    (entry,) = folder.iterdir()
    return entry


@pytest.fixture
def parses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def parse(*args: object, **kwargs: object) -> None:
        raise AssertionError("it was parsed")

    monkeypatch.setattr(executable_cache.serialize_executable, "deserialize_and_load", parse)
    monkeypatch.setattr(stored_program, "_decode", parse)


def _refuses(folder: Path, caplog: pytest.LogCaptureFixture, words: str) -> None:
    caplog.clear()
    assert _open(folder).load("program") is None
    assert words in caplog.text
    assert "it was parsed" not in caplog.text


@pytest.mark.usefixtures("parses_nothing")
def test_no_changed_byte_is_parsed(
    folder: Path, entry: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = entry.read_bytes()
    places = {0, 31, 32, 39, 40, 41, 200, len(whole) - 1, *range(0, len(whole), len(whole) // 20)}
    for place in places:
        entry.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        _refuses(folder, caplog, "its bytes have changed")
    for length in (0, 10, 32, 40, len(whole) // 2, len(whole) - 1):
        entry.write_bytes(whole[:length])
        _refuses(folder, caplog, "its bytes have changed")
    entry.write_bytes(whole + b"\0")
    _refuses(folder, caplog, "its bytes have changed")


class Bomb:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return os.mkdir, (str(self._mark),)


def test_a_pickle_is_not_executed(
    folder: Path, entry: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mark = tmp_path / "mark"
    bomb = pickle.dumps(Bomb(mark))
    for content in (bomb, hashlib.sha256(bomb).digest() + bomb, bytes(32) + bomb):
        entry.write_bytes(content)
        _refuses(folder, caplog, "its bytes have changed")
    assert not mark.exists()
    # The first load after it makes and keeps the program again.
    assert not load_or_compile(_open(folder), "program", _lowered).cached
    assert load_or_compile(_open(folder), "program", _lowered).cached


@pytest.mark.usefixtures("parses_nothing")
def test_an_entry_is_good_under_its_own_name_and_secret_only(
    folder: Path, entry: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = _open(folder)._path("other")
    other.write_bytes(entry.read_bytes())
    assert _open(folder).load("other") is None
    secret = folder.with_name("programs.secret")
    secret.write_bytes(bytes(32))
    _refuses(folder, caplog, "its bytes have changed")
    secret.unlink()
    _refuses(folder, caplog, "its bytes have changed")
    assert len(secret.read_bytes()) == 32


def test_what_is_written_is_for_this_user_alone(folder: Path, entry: Path) -> None:
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (folder, entry)]
    assert modes == [0o700, 0o600]
    secret = folder.with_name("programs.secret")
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert secret.read_bytes() not in entry.read_bytes()
    length = int.from_bytes(entry.read_bytes()[32:40], "little")
    in_tree, out_tree = json.loads(entry.read_bytes()[40 : 40 + length])
    assert out_tree == 0
    assert in_tree == ["tuple", [], [["tuple", [], [0]], ["dict", [], []]]]


@pytest.mark.usefixtures("parses_nothing")
@pytest.mark.parametrize(
    ("place", "mode", "words"),
    [
        ("programs", 0o770, "programs: others may write it"),
        ("programs", 0o777, "programs: others may write it"),
        ("programs.secret", 0o640, "secret: others may read it"),
        ("programs.secret", 0o606, "secret: others may write it"),
    ],
)
def test_a_cache_that_others_can_change_is_not_used(
    folder: Path, entry: Path, caplog: pytest.LogCaptureFixture, place: str, mode: int, words: str
) -> None:
    (folder.parent / place).chmod(mode)
    _refuses(folder, caplog, words)
    assert "is not used" in caplog.text
    before = entry.stat()
    assert not load_or_compile(_open(folder), "another", _lowered).cached
    assert list(folder.iterdir()) == [entry]
    assert entry.stat() == before


@pytest.mark.usefixtures("parses_nothing")
def test_what_belongs_to_another_user_is_not_used(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    _refuses(folder, caplog, "it belongs to user")


@pytest.mark.usefixtures("parses_nothing")
def test_an_entry_that_others_can_change_or_that_is_elsewhere_is_not_read(
    folder: Path, entry: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    entry.chmod(0o620)
    _refuses(folder, caplog, "others may write it")
    entry.chmod(0o600)
    entry.rename(tmp_path / "elsewhere")
    entry.symlink_to(tmp_path / "elsewhere")
    _refuses(folder, caplog, "symbolic link")
    secret = folder.with_name("programs.secret")
    for content in (b"", b"short", bytes(33)):
        secret.write_bytes(content)
        _refuses(folder, caplog, "not 32; delete it")
    moved = folder.with_name("moved")
    folder.rename(moved)
    folder.symlink_to(moved)
    _refuses(folder, caplog, "it is no folder")


def test_processes_that_start_together_share_one_secret(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        caches = list(pool.map(lambda _: _open(tmp_path / "programs"), range(16)))
    assert len({cache._secret for cache in caches}) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["programs", "programs.secret"]


def test_half_written_entries_go_at_the_next_start(folder: Path, entry: Path) -> None:
    left, live = folder / ".left.tmp", folder / ".live.tmp"
    left.touch()
    with live.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        _open(folder)
        assert sorted(folder.iterdir()) == sorted([entry, live])


def test_the_trees_of_an_engine_survive() -> None:
    count = len(DeviceState._fields)
    state = DeviceState(*([i, (i, None)] for i in range(count)))
    tree = jax.tree.structure((({"b": 1, "a": [2]}, state, None), {"x": ()}))
    stored = seal(StoredProgram(b"payload", tree, jax.tree.structure(state)), SECRET, "name")
    found = unseal(stored, SECRET, "name")
    assert found == StoredProgram(b"payload", tree, jax.tree.structure(state))
    assert isinstance(jax.tree.unflatten(found.out_tree, range(2 * count)), DeviceState)


def test_trees_of_strangers_are_not_written() -> None:
    Strange = collections.namedtuple("Strange", "x")
    for value in (Strange(1), {1: 2}, collections.OrderedDict(a=1)):
        tree = jax.tree.structure(value)
        with pytest.raises(TypeError, match="cannot be kept"):
            seal(StoredProgram(b"", tree, tree), SECRET, "name")
