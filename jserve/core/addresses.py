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
