"""The HTTP application: routes, error handlers and what stands before them."""

import logging

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from jserve.core.errors import EngineError, JserveError
from jserve.gateway.api_keys import ApiKeys
from jserve.gateway.http.cors import Cors
from jserve.gateway.http.edge import Edge, RequireKey
from jserve.gateway.http.errors import error_response, unrouted
from jserve.gateway.http.event_stream import ClientGone
from jserve.gateway.http.hosts import CheckHost
from jserve.gateway.http.messages_api.routes import MessagesRoutes
from jserve.gateway.http.ollama.routes import OllamaRoutes
from jserve.gateway.http.openai_routes import OpenAIRoutes
from jserve.gateway.http.probes import ProbeRoutes
from jserve.gateway.http.request_bodies import RequestBodies
from jserve.gateway.http.responses.routes import ResponseRoutes
from jserve.gateway.http.token_routes import TokenRoutes
from jserve.gateway.metrics import GatewayMetrics
from jserve.gateway.prometheus import make_registry
from jserve.gateway.request_plane import RequestPlane

_log = logging.getLogger(__name__)


def make_app(
    plane: RequestPlane,
    metrics: GatewayMetrics,
    *,
    version: str,
    bodies: RequestBodies | None = None,
) -> ASGIApp:
    """The ASGI application over `plane`; `metrics` is shared with the other front ends.

    The caller closes the `bodies` it passes; those made here end with the application.
    From outside in: request ids and counts, `Host`, CORS, API keys, routes.
    """
    config = plane.config
    registry = make_registry(metrics, plane.engine, lambda: plane.model_name)
    bodies = bodies or RequestBodies(plane)
    app: ASGIApp = Starlette(
        routes=[
            *OpenAIRoutes(plane, metrics, bodies).routes(),
            *ResponseRoutes(plane, metrics, bodies).routes(),
            *TokenRoutes(plane, bodies).routes(),
            *MessagesRoutes(plane, metrics, bodies).routes(),
            *OllamaRoutes(plane, metrics, bodies).routes(),
            *ProbeRoutes(plane, registry, version).routes(),
        ],
        exception_handlers={
            JserveError: _on_error,
            HTTPException: _on_unrouted,
            ClientGone: _on_gone,
            Exception: _on_bug,
        },
    )
    if config.has_keys:
        app = RequireKey(app, ApiKeys.from_config(config), any_priority=config.any_priority)
    app = Cors(app, config.cors_origins)
    return Edge(CheckHost(app, config), metrics, config)


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, JserveError)
    return error_response(error, request.scope)


async def _on_unrouted(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    response = error_response(unrouted(request, error.status_code), request.scope)
    for name, value in (error.headers or {}).items():
        response.headers[name] = value
    return response


async def _on_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # the server drops it, since the client is gone


async def _on_bug(request: Request, error: Exception) -> Response:
    # Starlette raises the error again after this, so the server logs it with its traceback.
    request_id = request.scope["request_id"]
    bug = EngineError(f"internal error; the log has it as request {request_id}")
    return error_response(bug, request.scope)
