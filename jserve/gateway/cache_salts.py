"""Salts of the prefix cache: requests of one salt share computed prompts, others share nothing.

Salts that clients give and those of tenants begin differently, so nobody can give a tenant's.
"""

from typing import Any

from jserve.core.errors import RequestError

MAX_CHARS = 256


def given_salt(value: Any) -> str | None:
    """The salt for the field `cache_salt` of a request; None if it is not given.

    All who give the same value share, whoever they are. No message shows it.

    Raises RequestError unless it is None or a text of 1 to `MAX_CHARS` characters.
    """
    if value is None:
        return None
    if not isinstance(value, str) or not 0 < len(value) <= MAX_CHARS or not _is_unicode(value):
        raise RequestError(
            f"cache_salt must be a text of 1 to {MAX_CHARS} characters; leave it out for the "
            "default",
            param="cache_salt",
        )
    return f"given:{value}"


def tenant_salt(identity: str) -> str:
    """The salt of a tenant's requests that give none."""
    return f"tenant:{identity}"


def _is_unicode(text: str) -> bool:
    """Whether UTF-8 can write it: Python's strings may hold halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
