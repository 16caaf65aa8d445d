"""Network addresses of one host."""

import ipaddress


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
