"""The link between gateway and engine on one machine: a private folder for a socket, a token."""

import contextlib
import fcntl
import os
import sys
import tempfile
from collections.abc import Iterator, MutableMapping
from pathlib import Path

from jserve.checkpoints.temporary import temporary_folder
from jserve.core.addresses import UNIX
from jserve.core.errors import ConfigError
from jserve.core.private_path import why_not_private
from jserve.proto.session_auth import MIN_TOKEN_BYTES

TOKEN_VARIABLE = "JSERVE_ENGINE_TOKEN"  # noqa: S105  the name of one
_MAX_SOCKET_PATH_BYTES = 107  # Linux has 108 for the path of a Unix socket, with a NUL
# What follows the temporary folder: temporary_folder's name, then session_server's.
_SOCKET_PATH_END = f"/.jserve-{os.geteuid()}.{'f' * 16}.tmp/engine-{'f' * 8}.sock"
_MAX_FOLDER_BYTES = _MAX_SOCKET_PATH_BYTES - len(_SOCKET_PATH_END)


@contextlib.contextmanager
def private_socket_folder() -> Iterator[str]:
    """The address of an engine in a new folder that only this user can enter; removed at the end.

    Folders of launchers that were killed are removed, too.
    """
    parent = tempfile.gettempdir()
    if len(os.fsencode(parent)) > _MAX_FOLDER_BYTES:
        parent = "/tmp"  # noqa: S108  the folder in it is private
    with contextlib.ExitStack() as stack:
        try:
            name = f"jserve-{os.geteuid()}"
            folder = stack.enter_context(temporary_folder(Path(parent), name, mode=0o700))
            held = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            stack.callback(os.close, held)
            # systemd removes what is old from temporary folders, but no folder that is locked.
            fcntl.flock(held, fcntl.LOCK_EX)
        except OSError as error:
            raise ConfigError(
                f"{parent}: no folder for the engine's socket can be made: {error}; "
                "set TMPDIR to a writable folder"
            ) from error
        yield f"{UNIX}{folder}/"


def read_token(file: str | None, environment: MutableMapping[str, str]) -> str | None:
    """The token of gateway and engine, from `file` (`-`: standard input) or the environment.

    The variable is removed from `environment`, so child processes do not inherit it. Raises
    ConfigError if the token is too short, or if other users can read the file.
    """
    token = environment.pop(TOKEN_VARIABLE, None)  # also if a file has precedence over it
    if file is None:
        return None if token is None else _checked(token.strip(), TOKEN_VARIABLE)
    if file == "-":
        return _checked(sys.stdin.readline().strip(), "standard input")
    try:
        with Path(file).open(encoding="utf-8") as stream:
            if reason := why_not_private(os.fstat(stream.fileno())):
                raise ConfigError(f"--engine_token_file={file}: {reason}; use chmod 600")
            text = stream.read(4096)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--engine_token_file={file}: cannot be read: {error}") from error
    return _checked(text.strip(), f"--engine_token_file={file}")


def _checked(token: str, place: str) -> str:
    if len(token.encode()) < MIN_TOKEN_BYTES:
        raise ConfigError(
            f"{place}: the engine's token has fewer than {MIN_TOKEN_BYTES} bytes; "
            "make one with: openssl rand -hex 32"
        )
    return token
