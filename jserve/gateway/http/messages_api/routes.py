"""Routes of the Anthropic API: messages, streamed and not, and the count of their tokens."""

import uuid

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from jserve.gateway.conversation import prepare, render
from jserve.gateway.http.edge import IGNORED_FIELDS
from jserve.gateway.http.errors import MESSAGES_PATH
from jserve.gateway.http.event_stream import EventStream, unless_disconnected
from jserve.gateway.http.messages_api.answer import MessageAnswer, MessagesStream
from jserve.gateway.http.request_bodies import RequestBodies
from jserve.gateway.metrics import GatewayMetrics
from jserve.gateway.request_plane import RequestPlane
from jserve.gateway.tenants import Caller

_STREAM = MessagesStream()


class MessagesRoutes:
    """Answers the Anthropic routes. The header `anthropic-version` is not looked at."""

    def __init__(self, plane: RequestPlane, metrics: GatewayMetrics, bodies: RequestBodies) -> None:
        self._plane = plane
        self._metrics = metrics
        self._bodies = bodies

    def routes(self) -> list[Route]:
        return [
            Route(MESSAGES_PATH, self.messages, methods=["POST"]),
            Route(f"{MESSAGES_PATH}/count_tokens", self.count_tokens, methods=["POST"]),
        ]

    async def messages(self, request: Request) -> Response:
        asked = await self._bodies.messages(request)
        self._plane.check_model(asked.model)
        caller: Caller = request.scope["caller"]
        with self._plane.preparing(caller, 1, 1):
            prepared = await prepare(
                self._plane,
                asked.conversation,
                id=f"msg_{uuid.uuid4().hex}",
                caller=caller,
                ignored=request.scope.get(IGNORED_FIELDS),
            )
        answer = MessageAnswer(
            asked=asked,
            prepared=prepared,
            model=self._plane.model_name,
            plane=self._plane,
            metrics=self._metrics,
        )
        if asked.stream:
            keep_alive_s = self._plane.config.sse_keep_alive_s
            return EventStream(answer.events(), keep_alive_s=keep_alive_s, form=_STREAM)
        body = await unless_disconnected(request.receive, answer.whole())
        return Response(body, media_type="application/json")

    async def count_tokens(self, request: Request) -> Response:
        """The tokens of the prompt that the messages and the tools become."""
        asked = await self._bodies.messages_count(request)
        self._plane.check_model(asked.model)
        caller: Caller = request.scope["caller"]
        with self._plane.preparing(caller, 1, None):
            prompt = await render(
                self._plane,
                asked.conversation,
                caller=caller,
                ignored=request.scope.get(IGNORED_FIELDS),
            )
        body = orjson.dumps({"input_tokens": len(prompt.ids)})
        return Response(body, media_type="application/json")
