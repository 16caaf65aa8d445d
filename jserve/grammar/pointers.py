"""JSON pointers (RFC 6901) inside of one document."""

from typing import Any


def resolve(document: Any, pointer: str) -> Any:
    """Returns what `pointer` leads to; None if it leads nowhere."""
    found = document
    for part in pointer.split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict) and key in found:
            found = found[key]
        elif isinstance(found, list) and key.isascii() and key.isdigit() and int(key) < len(found):
            found = found[int(key)]
        else:
            return None
    return found
