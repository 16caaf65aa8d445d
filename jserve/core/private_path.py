"""Whether other users of this machine can reach or change a file or folder."""

import os
import stat
from pathlib import Path


def why_not_ours(found: os.stat_result) -> str | None:
    """Why another user can change what `found` describes; None if only this user (or root) can."""
    if found.st_uid != os.geteuid():
        return f"it belongs to user {found.st_uid}, not to {os.geteuid()}"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others may write it (mode {stat.S_IMODE(found.st_mode):04o})"
    return None


def why_not_private(found: os.stat_result) -> str | None:
    """Why another user can read, enter or change what `found` describes; None if nobody can."""
    if reason := why_not_ours(found):
        return reason
    if found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        return f"others may read it (mode {stat.S_IMODE(found.st_mode):04o})"
    return None


def why_folder_not_private(folder: Path) -> str | None:
    """Returns the reason why `folder`, or a link in its place, is not ours alone; None if it is."""
    try:
        found = folder.lstat()
    except OSError as error:
        return error.strerror or str(error)
    return why_not_private(found) if stat.S_ISDIR(found.st_mode) else "it is no folder"
