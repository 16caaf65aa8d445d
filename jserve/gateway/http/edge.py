"""Middleware of every HTTP exchange: request ids, tenants, access log, metrics, and API keys."""

import logging
import re
import uuid

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jserve.core.errors import Unauthenticated
from jserve.gateway.api_keys import ApiKeyCheck
from jserve.gateway.config import GatewayConfig
from jserve.gateway.http.errors import error_response
from jserve.gateway.metrics import GatewayMetrics
from jserve.gateway.tenants import at_address

_log = logging.getLogger(__name__)

_REQUEST_ID = re.compile(r"[\x21-\x7e]+")
_OPEN_PATHS = frozenset(("/health", "/ready", "/version", "/metrics"))  # for probes and scrapers


class Edge:
    """Gives every response an X-Request-Id (the client's own where it is usable) and counts it."""

    def __init__(self, app: ASGIApp, metrics: GatewayMetrics, config: GatewayConfig) -> None:
        self._app = app
        self._metrics = metrics
        self._max_id_chars = config.max_request_id_chars
        self._any_priority = config.any_priority

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = self._request_id(Headers(scope=scope).get("x-request-id", ""))
        scope["request_id"] = request_id
        host, _ = scope["client"] or (None, 0)
        scope["caller"] = at_address(host, may_set_priority=self._any_priority)
        header = (b"x-request-id", request_id.encode("ascii"))
        status = 499  # nginx's number for a client that left without an answer
        start_s = self._metrics.clock.now_s()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), header]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            duration_s = self._metrics.clock.now_s() - start_s
            self._finish(scope, status, duration_s)

    def _request_id(self, given: str) -> str:
        if len(given) <= self._max_id_chars and _REQUEST_ID.fullmatch(given):
            return given
        return uuid.uuid4().hex

    def _finish(self, scope: Scope, status: int, duration_s: float) -> None:
        route = getattr(scope.get("route"), "path", "other")
        method = scope["method"] if route != "other" else "other"  # bounds the labels
        self._metrics.count_http(route, method, status, duration_s)
        level = logging.DEBUG if scope["path"] in _OPEN_PATHS else logging.INFO
        _log.log(
            level,
            "%s %s %d in %.1f ms, request %s",
            scope["method"],
            scope["path"][:200],
            status,
            duration_s * 1e3,
            scope["request_id"],
        )


class ApiKeys:
    """Requires `Authorization: Bearer <key>` with a known key; probes are open."""

    def __init__(self, app: ASGIApp, config: GatewayConfig) -> None:
        self._app = app
        self._keys = ApiKeyCheck(config.api_keys)
        self._any_priority = config.any_priority

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in _OPEN_PATHS or self._allows(scope):
            await self._app(scope, receive, send)
            return
        error = Unauthenticated("the API key is missing or wrong; send Authorization: Bearer <key>")
        await error_response(error)(scope, receive, send)

    def _allows(self, scope: Scope) -> bool:
        """Whether the key is known; then the request is of its tenant."""
        given = dict(scope["headers"]).get(b"authorization", b"")
        caller = self._keys.caller(given, may_set_priority=self._any_priority)
        if caller is not None:
            scope["caller"] = caller
        return caller is not None
