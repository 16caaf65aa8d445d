"""Network addresses of one host."""

import ipaddress
from pathlib import Path

from jserve.core.errors import ConfigError

UNIX = "unix:"  # begins the address of a Unix socket; a path follows


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`: `localhost` or a loopback address, `[::1]` too."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False  # any other name


def host_and_port(host: str, port: int) -> str:
    """Joins both as URLs and gRPC write them: an IPv6 address is put in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def socket_path(address: str) -> Path | None:
    """The path of the Unix socket at `address`; None for `host:port`."""
    return Path(address.removeprefix(UNIX)) if address.startswith(UNIX) else None


def check_engine_address(address: str, *, has_token: bool) -> None:
    """Raises ConfigError unless gateway and engine can meet at `address`, and nobody else.

    That is a Unix socket, whose folder is checked when it is used, or, with a token that both ends
    hold, `host:port` on loopback.
    """
    if socket_path(address) is not None:
        return
    host, _, port = address.rpartition(":")
    if not port.isdecimal() or int(port) >= 1 << 16:
        raise ConfigError(
            f"engine address {address!r}: write unix:/folder/name or host:port, e.g. 127.0.0.1:8600"
        )
    if not is_loopback(host):
        raise ConfigError(f"engine address {address!r}: must be on loopback, e.g. 127.0.0.1:8600")
    if not has_token:
        raise ConfigError(
            f"engine address {address!r}: every user of this machine can use a TCP port, so "
            "gateway and engine need a token (--engine_token_file or JSERVE_ENGINE_TOKEN); or use "
            "unix:/folder/name in a folder of mode 0700"
        )
