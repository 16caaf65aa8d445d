"""Routes for operators: /health, /ready, /version, /metrics."""

import orjson
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from jserve.core.errors import Unavailable
from jserve.gateway.request_plane import RequestPlane


class ProbeRoutes:
    """Answers probes and scrapes; never waits for the engine."""

    def __init__(self, plane: RequestPlane, registry: CollectorRegistry, version: str) -> None:
        self._plane = plane
        self._registry = registry
        self._version = orjson.dumps({"version": version})

    def routes(self) -> list[Route]:
        return [
            Route("/health", self.health, methods=["GET"]),
            Route("/ready", self.ready, methods=["GET"]),
            Route("/version", self.version, methods=["GET"]),
            Route("/metrics", self.metrics, methods=["GET"]),
        ]

    async def health(self, request: Request) -> Response:
        """Responds 200 while the process lives; for a liveness probe."""
        return Response(b'{"status":"alive"}', media_type="application/json")

    async def ready(self, request: Request) -> Response:
        """Responds 200 only when a request can be answered now; for a readiness probe."""
        if not self._plane.ready:
            message = "not ready: the engine is starting, restarting or draining"
            raise Unavailable(message, retry_after_s=1.0)
        return Response(b'{"status":"ready"}', media_type="application/json")

    async def version(self, request: Request) -> Response:
        return Response(self._version, media_type="application/json")

    async def metrics(self, request: Request) -> Response:
        body = generate_latest(self._registry)
        return Response(body, headers={"content-type": CONTENT_TYPE_LATEST})
