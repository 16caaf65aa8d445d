"""Which web pages may call: those of this machine, and of configured origins."""

import re
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from jserve.gateway.http.edge import IGNORED_FIELDS_HEADER

# Origins of pages that a program on the browser's own machine serves.
_LOOPBACK = r"https?://(localhost|[a-z0-9-]+\.localhost|127(\.\d{1,3}){3}|\[::1\])(:\d{1,5})?"


class Cors:
    """Answers preflight requests and lets pages of allowed origins read the answers.

    Without configured origins a page from elsewhere is answered as if there were no CORS.
    """

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        self._app = app
        self._is_loopback = re.compile(_LOOPBACK).fullmatch
        self._always = bool(origins)
        self._cors = CORSMiddleware(
            app,
            allow_origins=origins,
            allow_origin_regex=_LOOPBACK,
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after", IGNORED_FIELDS_HEADER],
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on."""
        origin = Headers(scope=scope).get("origin", "") if scope["type"] == "http" else ""
        allows = self._always or self._is_loopback(origin) is not None
        await (self._cors if allows else self._app)(scope, receive, send)
