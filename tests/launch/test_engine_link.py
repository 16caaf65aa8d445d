"""The private folder of the engine's socket, and where gateway and engine find their token."""

import io
import socket
import stat
import sys
import tempfile
from pathlib import Path

import pytest

from jserve.core.errors import ConfigError
from jserve.launch.engine_link import _MAX_FOLDER_BYTES, private_socket_folder, read_token

TOKEN = "0123456789abcdef" * 2


def test_the_folder_is_private_and_gone_at_the_end() -> None:
    with private_socket_folder() as address, private_socket_folder() as other:
        assert address != other
        assert address.startswith("unix:/")
        assert address.endswith("/")
        folder = Path(address.removeprefix("unix:"))
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        (folder / "engine.sock").touch()
    assert not folder.exists()


def test_a_long_temporary_folder_is_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 90)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with private_socket_folder() as address:
        assert len(address) < 90


def test_a_socket_fits_into_the_longest_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        for room, fits in ((_MAX_FOLDER_BYTES, True), (_MAX_FOLDER_BYTES + 1, False)):
            parent = Path(short) / ("x" * (room - len(short) - 1))
            parent.mkdir()
            monkeypatch.setattr(tempfile, "tempdir", str(parent))
            with private_socket_folder() as address, socket.socket(socket.AF_UNIX) as unix:
                folder = Path(address.removeprefix("unix:"))
                assert (folder.parent == parent) is fits
                path = folder / "engine-01234567.sock"
                assert not fits or len(str(path)) == 107
                unix.bind(str(path))


def test_no_place_for_a_folder_is_a_config_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/no/such/folder")
    with pytest.raises(ConfigError, match="TMPDIR"), private_socket_folder():
        pass


def test_a_token_comes_from_a_private_file(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.touch(0o600)
    file.write_text(f"{TOKEN}\n")
    assert read_token(str(file), {"JSERVE_ENGINE_TOKEN": "f" * 32}) == TOKEN
    for mode in (0o640, 0o604, 0o620):
        file.chmod(mode)
        with pytest.raises(ConfigError, match="chmod 600"):
            read_token(str(file), {})
    file.chmod(0o600)
    for content in ("", "\n", TOKEN[:31]):
        file.write_text(content)
        with pytest.raises(ConfigError, match="fewer than 32 bytes") as refused:
            read_token(str(file), {})
        assert not content.strip() or content not in str(refused.value)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_token(str(tmp_path / "nothing"), {})


def test_a_token_comes_from_the_environment_or_standard_input(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert read_token(None, {}) is None
    environment = {"JSERVE_ENGINE_TOKEN": f" {TOKEN}\n", "HOME": "/"}
    assert read_token(None, environment) == TOKEN
    assert environment == {"HOME": "/"}  # children inherit no secret
    for empty in ("", " ", "short"):
        with pytest.raises(ConfigError, match="JSERVE_ENGINE_TOKEN"):
            read_token(None, {"JSERVE_ENGINE_TOKEN": empty})
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{TOKEN}\n"))
    assert read_token("-", {}) == TOKEN
    with pytest.raises(ConfigError, match="standard input"):
        read_token("-", {})
