"""Middleware that checks `Host`, so that no web page reaches a local server by a name of its own.

With DNS rebinding a page of `evil.example` lets its name point to 127.0.0.1 and then asks as if the
server there were its own. The browser still says `Host: evil.example`.
"""

import ipaddress
import re
import socket

from starlette.types import ASGIApp, Receive, Scope, Send

from jserve.core.addresses import is_loopback
from jserve.gateway.config import GatewayConfig
from jserve.gateway.http.errors import HttpError, error_response

_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~!$&'()*+,;=%-]+)(:[0-9]*)?")
_ANY = "*"


class CheckHost:
    """Answers 400 unless the request has one Host, and one that names this server."""

    def __init__(self, app: ASGIApp, config: GatewayConfig) -> None:
        """Every name is allowed where only other machines would use it, unless some are named."""
        self._app = app
        self._allowed = frozenset(name.lower().rstrip(".") for name in config.allowed_hosts)
        named = bool(self._allowed) or is_loopback(config.host)
        self._any = _ANY in self._allowed or not named

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self._error(scope) if scope["type"] == "http" else None
        if error is None:
            await self._app(scope, receive, send)
        else:
            await error_response(error, scope)(scope, receive, send)

    def _error(self, scope: Scope) -> HttpError | None:
        given = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        if not given and scope["http_version"] == "1.0":  # a header of HTTP/1.1
            return None
        if len(given) != 1:
            return _refusal(f"send one Host header, not {len(given)}")
        match = _HOST.fullmatch(given[0])
        if match is None:
            return _refusal("the Host header is not a host and a port")
        host = match[1].lower().rstrip(".")
        if self._any or is_local_name(host) or self._is_allowed(host):
            return None
        return _refusal(
            f"Host {host[:100]!r} is not a name of this server; gateway.allowed_hosts adds names"
        )

    def _is_allowed(self, host: str) -> bool:
        """Whether the config names the host, or as `*.example.com` all below its domain."""
        domains = (f"*{host[at:]}" for at, char in enumerate(host) if char == ".")
        return host in self._allowed or not self._allowed.isdisjoint(domains)


def is_local_name(host: str) -> bool:
    """Whether no page on the internet can have `host`, in lower case, as its own name.

    That is an address, a name without a dot, one below `localhost`, or this machine's own name.
    """
    if "." not in host or host.endswith(".localhost") or host == socket.gethostname().lower():
        return True
    try:
        ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return False
    return True


def _refusal(message: str) -> HttpError:
    return HttpError(400, message, code="invalid_host")
