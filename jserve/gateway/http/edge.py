"""Middleware of every HTTP exchange: request ids, tenants, access log, metrics, and API keys."""

import asyncio
import logging
import re
import uuid
from urllib.parse import quote

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jserve.core.errors import Unauthenticated
from jserve.gateway.api_keys import ApiKeys
from jserve.gateway.config import GatewayConfig
from jserve.gateway.http.errors import error_response, is_messages_path
from jserve.gateway.http.fields import MAX_NAMED
from jserve.gateway.metrics import GatewayMetrics
from jserve.gateway.request_plane import shutting_down
from jserve.gateway.tenants import at_address

_log = logging.getLogger(__name__)

# Key of an ASGI scope: a list of the names of fields that the request has and this server has not.
IGNORED_FIELDS = "ignored_fields"
IGNORED_FIELDS_HEADER = "x-jserve-ignored-fields"

_REQUEST_ID = re.compile(r"[\x21-\x7e]+")
_NO_ANSWER = 499  # nginx's number for a client that left without an answer
_OPEN_PATHS = frozenset(("/health", "/ready", "/version", "/metrics"))  # for probes and scrapers


class Edge:
    """Gives every response an X-Request-Id (the client's own where it is usable) and counts it.

    Anthropic's clients read the id from Request-Id.
    """

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
        names = [b"x-request-id"] + [b"request-id"] * is_messages_path(scope["path"])
        headers = [(name, request_id.encode("ascii")) for name in names]
        status = _NO_ANSWER
        start_s = self._metrics.clock.now_s()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), *headers, *_ignored(scope)]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except asyncio.CancelledError:  # the server ends, and has waited long enough
            if status == _NO_ANSWER:
                await error_response(shutting_down(), scope)(scope, receive, send_with_id)
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
            scope["raw_path"].decode("latin-1")[:200],  # as sent, without decoded line feeds
            status,
            duration_s * 1e3,
            scope["request_id"],
        )


def _ignored(scope: Scope) -> list[tuple[bytes, bytes]]:
    """The header that names what was ignored of a request, if anything was."""
    names: list[str] = scope.get(IGNORED_FIELDS, [])
    if not names:
        return []
    # Names are the client's: what a header or a list of names cannot hold is percent-encoded.
    shown = [quote(name, safe="[]/.") for name in dict.fromkeys(names[:MAX_NAMED])]
    shown += ["..."] * (len(names) > MAX_NAMED)
    return [(IGNORED_FIELDS_HEADER.encode(), ", ".join(shown).encode("ascii"))]


class RequireKey:
    """Requires `Authorization: Bearer` or `x-api-key` with a known key; probes are open.

    The key's tenant becomes `scope["caller"]`.
    """

    def __init__(self, app: ASGIApp, keys: ApiKeys, *, any_priority: bool) -> None:
        self._app = app
        self._keys = keys
        self._any_priority = any_priority

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in _OPEN_PATHS:
            headers = dict(scope["headers"])
            grant = self._keys.find(headers.get(b"authorization", b""))
            if grant is None:
                grant = self._keys.find_key(headers.get(b"x-api-key", b""))
            if grant is None:
                error = Unauthenticated(
                    "the API key is missing or wrong; send Authorization: Bearer <key>, or "
                    "x-api-key: <key>"
                )
                await error_response(error, scope)(scope, receive, send)
                return
            scope["caller"] = grant.caller(any_priority=self._any_priority)
        await self._app(scope, receive, send)
