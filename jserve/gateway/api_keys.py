"""Checks a caller's API key, for HTTP and gRPC."""

import hashlib
import hmac
from collections.abc import Iterable

from jserve.gateway.tenants import Caller


class ApiKeyCheck:
    """Knows the keys by their digests only."""

    def __init__(self, api_keys: Iterable[str]) -> None:
        self._digests = [_digest(key.encode()) for key in api_keys]

    def allows(self, authorization: bytes) -> bool:
        """Whether the header's value is `Bearer <key>` with a known key."""
        return self.caller(authorization) is not None

    def caller(self, authorization: bytes, *, may_set_priority: bool = False) -> Caller | None:
        """The tenant with the key in the header's value, `Bearer <key>`; None if it is unknown."""
        scheme, _, key = authorization.partition(b" ")
        digest = _digest(key.strip())
        # Comparing every key in constant time leaks nothing by timing.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if scheme.lower() != b"bearer" or not any(matches):
            return None
        return Caller(f"key {digest.hex()[:12]}", may_set_priority)


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
