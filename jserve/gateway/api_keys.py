"""API keys and what each of them may do, for HTTP and gRPC."""

import hashlib
import hmac
import itertools
import os
import re
import stat
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from jserve.core.errors import ConfigError
from jserve.gateway.cache_salts import tenant_salt
from jserve.gateway.config import MAX_SLOTS, GatewayConfig, check_key
from jserve.gateway.tenants import Caller

_SHA256 = re.compile(r"[0-9a-fA-F]{64}")
_FIELDS = ("key", "sha256", "priority", "max_slots", "admin")
_MAX_FILE_BYTES = 1 << 20
_MAX_NAME_CHARS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyGrant:
    """Who a caller is, by the key that it gave."""

    name: str  # the tenant of its requests
    priority: bool = False  # the `priority` of its requests is obeyed
    max_slots: int | None = None  # sequences that run at a time; None: as of every tenant
    admin: bool = False
    # Names what only this caller shares. A key without a name goes by its digest here, since its
    # number changes with the list of keys, and computed prompts outlive the gateway in an engine.
    identity: str = field(default="", repr=False)

    def caller(self, *, any_priority: bool = False) -> Caller:
        """The tenant of its requests; with `any_priority` their priority is obeyed anyway."""
        return Caller(
            f"key {self.name}",
            self.priority or any_priority,
            self.max_slots,
            cache_salt=tenant_salt(self.identity or f"key {self.name}"),
        )


class ApiKeys:
    """The known keys, by their digests only."""

    def __init__(self, grants: dict[bytes, KeyGrant]) -> None:
        """Takes a grant for each SHA-256 of a key."""
        self._grants = grants

    @classmethod
    def from_config(cls, config: GatewayConfig) -> Self:
        """Reads `api_keys_file`, and adds `api_keys`, which have a name but no rights.

        A key that the file has, too, keeps the file's name and rights.

        Raises:
            ConfigError: the file is readable by others, or is not what its format says.
        """
        grants: dict[bytes, KeyGrant] = {}
        if config.api_keys_file is not None:
            grants = _read_file(Path(config.api_keys_file))
        taken = {grant.name for grant in grants.values()}
        names = (name for i in itertools.count(1) if (name := f"key-{i}") not in taken)
        for key in config.keys:
            digest = _digest(key.reveal().encode())
            identity = f"sha256 {digest.hex()}"
            grants.setdefault(digest, KeyGrant(name=next(names), identity=identity))
        return cls(grants)

    def find(self, authorization: bytes | str) -> KeyGrant | None:
        """The grant of the key in the header's value `Bearer <key>`; None for an unknown one."""
        if isinstance(authorization, str):
            authorization = authorization.encode()
        scheme, _, key = authorization.partition(b" ")
        found = self.find_key(key.strip())
        return found if scheme.lower() == b"bearer" else None

    def find_key(self, key: bytes) -> KeyGrant | None:
        """The grant of a key; None for an unknown one."""
        digest, found = _digest(key), None
        # Comparing every key in constant time leaks nothing by timing.
        for known, grant in self._grants.items():
            if hmac.compare_digest(digest, known):
                found = grant
        return found

    def find_in(self, metadata: Iterable[tuple[str, str | bytes]]) -> KeyGrant | None:
        """The grant of a gRPC call, from its metadata `authorization`."""
        return self.find(dict(metadata).get("authorization", ""))


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _read_file(path: Path) -> dict[bytes, KeyGrant]:
    """Parses the tables `[keys.NAME]` of a TOML file that nobody else can read."""
    try:
        whole = tomllib.loads(_read_private(path).decode())
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: is not TOML: {error}") from None
    tables = whole.pop("keys", None)
    if whole or not isinstance(tables, dict) or not tables:
        raise ConfigError(f"{path}: must have one table [keys.NAME] for each key, and nothing else")
    grants: dict[bytes, KeyGrant] = {}
    for name, table in tables.items():
        digest, grant = _grant(path, name, table)
        if digest in grants:
            raise ConfigError(f"{path}: keys {grants[digest].name!r} and {name!r} are the same key")
        grants[digest] = grant
    return grants


def _read_private(path: Path) -> bytes:
    """The bytes of a regular file of ours (or root's) that others can neither read nor write."""
    try:
        # Without O_NONBLOCK a named pipe would hold up the start.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ConfigError(f"{path}: is not a file")
            mode = stat.S_IMODE(status.st_mode)
            if mode & 0o077:
                message = f"{path}: has mode {mode:04o}, so others may read or change the keys; "
                raise ConfigError(f"{message}run chmod 600 {path}")
            if status.st_uid not in (os.geteuid(), 0):
                raise ConfigError(f"{path}: belongs to another user, who could change the keys")
            content = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        message = f"gateway.api_keys_file {str(path)!r} cannot be read: {error.strerror}"
        raise ConfigError(message) from error
    if len(content) > _MAX_FILE_BYTES:
        raise ConfigError(f"{path}: is larger than {_MAX_FILE_BYTES} bytes")
    return content


def _grant(path: Path, name: str, table: Any) -> tuple[bytes, KeyGrant]:
    """The digest and the rights of one `[keys.NAME]`.

    No message repeats a value, which may be a key in the wrong place.
    """
    where = f"{path}: keys.{name}"
    if not name.strip() or not name.isprintable() or len(name) > _MAX_NAME_CHARS:
        raise ConfigError(f"{path}: {name[:_MAX_NAME_CHARS]!r} is no name for a key")
    if not isinstance(table, dict):
        raise ConfigError(f"{where} must be a table, [keys.{name}]")
    if unknown := [field for field in table if field not in _FIELDS]:
        raise ConfigError(f"{where} has no field {unknown[0]!r}; it has {', '.join(_FIELDS)}")
    if ("key" in table) == ("sha256" in table):
        raise ConfigError(f"{where} needs one of key and sha256")
    for right in ("priority", "admin"):
        if not isinstance(table.get(right, False), bool):
            raise ConfigError(f"{where}.{right} must be true or false")
    max_slots = table.get("max_slots")
    if max_slots is not None and (type(max_slots) is not int or not 1 <= max_slots <= MAX_SLOTS):
        raise ConfigError(f"{where}.max_slots must be a whole number from 1 to {MAX_SLOTS}")
    if "key" in table:
        if not isinstance(table["key"], str):
            raise ConfigError(f"{where}.key must be text")
        check_key(f"{where}.key", table["key"])
        digest = _digest(table["key"].encode())
    else:
        if not isinstance(table["sha256"], str) or not _SHA256.fullmatch(table["sha256"]):
            raise ConfigError(f"{where}.sha256 must be 64 hexadecimal digits")
        digest = bytes.fromhex(table["sha256"])
    return digest, KeyGrant(
        name=name,
        priority=table.get("priority", False),
        max_slots=max_slots,
        admin=table.get("admin", False),
    )
