"""Temporary folders that no crash leaves behind: each has a lock, held while its maker lives.

The lock is `flock`, which the kernel releases with the process. So a process that starts later
knows which folders have no maker any more, also where several containers share the folder and
every one of them has the same process ids. No JAX.
"""

import contextlib
import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

_SUFFIX = ".tmp"
_LOCK = ".lock"


@contextlib.contextmanager
def temporary_folder(parent: Path, name: str, mode: int = 0o777) -> Iterator[Path]:
    """A new folder `.NAME.….tmp` in `parent`; it and all in it are deleted at the end.

    Its maker may rename it. Abandoned ones of the same name are removed first. Raises OSError.
    """
    remove_abandoned(parent, name)
    folder = parent / f".{name}.{secrets.token_hex(8)}{_SUFFIX}"
    lock = folder.with_name(folder.name + _LOCK)
    with _locked_file(lock):
        try:
            folder.mkdir(mode)
            yield folder
        finally:  # the lock goes last: a folder without one has no maker
            shutil.rmtree(folder, ignore_errors=True)
            lock.unlink(missing_ok=True)


def remove_abandoned(parent: Path, name: str | None = None) -> None:
    """Removes temporary folders in `parent` whose makers are gone; of any name if it is None.

    What cannot be removed stays, without an error.
    """
    pattern = f".{'*' if name is None else glob.escape(name)}.*{_SUFFIX}"
    with contextlib.suppress(OSError):
        for lock in parent.glob(pattern + _LOCK):
            with contextlib.suppress(OSError), lock.open("rb+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.with_name(lock.name.removesuffix(_LOCK)), ignore_errors=True)
                lock.unlink()
        for folder in parent.glob(pattern):
            if folder.is_dir() and not folder.with_name(folder.name + _LOCK).exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a version without locks


def _locked_file(path: Path) -> BinaryIO:
    """Makes the file `path`, locked until it is closed."""
    while True:
        file = path.open("xb")
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            # Another process may have taken the file for an abandoned one before it was locked.
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        except FileNotFoundError:
            pass
        except BaseException:
            file.close()
            raise
        file.close()
