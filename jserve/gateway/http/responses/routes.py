"""Routes of the Responses API: create, fetch, cancel, delete, list the input."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from jserve.core.errors import EngineError, JserveError, RequestError
from jserve.gateway.conversation import Conversation, PreparedChat, prepare
from jserve.gateway.http.edge import IGNORED_FIELDS
from jserve.gateway.http.event_stream import EventStream, StreamForm, unless_disconnected
from jserve.gateway.http.request_bodies import RequestBodies
from jserve.gateway.http.responses.answer import ResponseAnswer, ResponseHead
from jserve.gateway.http.responses.history import chat_messages
from jserve.gateway.http.responses.items import Item, new_id
from jserve.gateway.http.responses.kept import (
    Context,
    decoded,
    encoded,
    find_context,
    not_found,
    stored_response,
)
from jserve.gateway.http.responses.request import ResponseRequest
from jserve.gateway.http.responses.store import ResponseStore, StoredItem, StoredResponse
from jserve.gateway.metrics import GatewayMetrics
from jserve.gateway.request_plane import RequestPlane
from jserve.gateway.tenants import Caller

_log = logging.getLogger(__name__)

_PAGE, _MAX_PAGE = 20, 100  # items of one list
_MAX_PAGE_DIGITS = 9  # so that reading them takes no time
# Fields of a conversation, as its errors name them → those of this API.
_PARAMS = {"messages": "input", "prompt": "input"}


class _Events(StreamForm):
    """Events of responses: the last of them says that there are no more."""

    end = b""


_EVENTS = _Events()


@dataclass(frozen=True, slots=True)
class _Background:
    """A response that is made while its client is elsewhere."""

    tenant: str
    head: ResponseHead
    before: tuple[StoredItem, ...]
    task: asyncio.Task[None]

    def stored(self) -> StoredResponse:
        encoded = orjson.dumps(self.head.json("in_progress", []))
        return stored_response(self.head.id, encoded, self.before, (), background=True)


class ResponseRoutes:
    """Answers `/v1/responses`. `unix_s` is the clock behind `created_at`."""

    def __init__(
        self,
        plane: RequestPlane,
        metrics: GatewayMetrics,
        bodies: RequestBodies,
        *,
        unix_s: Callable[[], float] = time.time,
    ) -> None:
        config = plane.config
        self.store = ResponseStore(config.max_stored_responses, config.max_stored_response_bytes)
        self._plane = plane
        self._metrics = metrics
        self._bodies = bodies
        self._unix_s = unix_s
        self._background: dict[str, _Background] = {}  # those that are not done

    def routes(self) -> list[Route]:
        path = "/v1/responses"
        return [
            Route(path, self.create, methods=["POST"]),
            Route(path + "/{id}", self.retrieve, methods=["GET"]),
            Route(path + "/{id}", self.delete, methods=["DELETE"]),
            Route(path + "/{id}/cancel", self.cancel, methods=["POST"]),
            Route(path + "/{id}/input_items", self.input_items, methods=["GET"]),
        ]

    async def create(self, request: Request) -> Response:
        asked = await self._bodies.response(request)
        self._plane.check_model(asked.model)
        caller: Caller = request.scope["caller"]
        response_id = new_id("resp")
        with self._plane.preparing(caller, 1, 1):
            context = find_context(self.store, caller.name, asked.previous_response_id, asked.input)
            prepared = await self._prepare(
                response_id, asked, context, caller, request.scope.get(IGNORED_FIELDS)
            )
        # Only now it is known that the items are no longer than the model's context.
        before = encoded(context) if asked.store else ()
        answer = self._answer(asked, prepared, before)
        if asked.background:
            return self._start(answer, before, caller.name)
        if asked.stream:
            keep_alive_s = self._plane.config.sse_keep_alive_s
            return EventStream(answer.events(), keep_alive_s=keep_alive_s, form=_EVENTS)
        return _json(await unless_disconnected(request.receive, answer.whole()))

    async def retrieve(self, request: Request) -> Response:
        if request.query_params.get("stream", "false").lower() not in ("false", "0", ""):
            message = "stream: not supported yet when a response is fetched; leave it out"
            raise RequestError(message, param="stream")
        return _json(self._find(request).json)

    async def delete(self, request: Request) -> Response:
        """Forgets the response; one that is being made ends."""
        found = self._find(request)
        await self._stop(found.id)
        self.store.delete(request.scope["caller"].name, found.id)
        return _json(orjson.dumps({"id": found.id, "object": "response", "deleted": True}))

    async def cancel(self, request: Request) -> Response:
        """Ends a background response; one that has ended stays as it is."""
        found = self._find(request)
        if not found.background:
            raise RequestError(
                f"response {found.id!r} was not made with background: true, and so has ended; "
                "others end when their connection is closed",
                param="response_id",
            )
        await self._stop(found.id)
        return _json(self._find(request).json)

    async def input_items(self, request: Request) -> Response:
        """The items of the conversation before the output, newest first by default."""
        items = self._find(request).input
        query = request.query_params
        order = query.get("order", "desc")
        if order not in ("asc", "desc"):
            raise RequestError(f"order must be asc or desc, not {order[:40]!r}", param="order")
        if order == "desc":
            items = items[::-1]
        start = _place_after(items, query.get("after"))
        page = items[start : start + _limit(query.get("limit"))]
        listed = {
            "object": "list",
            "data": [orjson.Fragment(item.json) for item in page],
            "first_id": page[0].id if page else None,
            "last_id": page[-1].id if page else None,
            "has_more": start + len(page) < len(items),
        }
        return _json(orjson.dumps(listed))

    async def _prepare(
        self,
        response_id: str,
        asked: ResponseRequest,
        context: Context,
        caller: Caller,
        ignored: list[str] | None,
    ) -> PreparedChat:
        wanted = Conversation(
            messages=chat_messages(decoded(context), asked.instructions),
            tools=asked.tools.tools,
            tool_choice=asked.tools.choice,
            parallel_tool_calls=asked.parallel_tool_calls,
            structured=asked.structured,
            max_reasoning_tokens=asked.max_reasoning_tokens,
            sampling=asked.sampling,
            stop=asked.stop,
            priority=asked.priority,
            cache_salt=asked.cache_salt,
            # What the context has no room for is cut off, as what is longer than asked for.
            default_max_tokens=asked.max_output_tokens,
            skip_special_tokens=asked.skip_special_tokens,
            variables=asked.variables,
        )
        try:
            return await prepare(
                self._plane, wanted, id=response_id, caller=caller, ignored=ignored
            )
        except RequestError as error:
            error.param = _PARAMS.get(error.param or "", error.param)
            raise

    def _answer(
        self, asked: ResponseRequest, prepared: PreparedChat, before: tuple[StoredItem, ...]
    ) -> ResponseAnswer:
        generation = prepared.generation
        sampling, tenant = generation.sampling, generation.caller.name

        def keep(body: bytes, output: list[Item]) -> None:
            if asked.store:
                stored = stored_response(
                    generation.id, body, before, output, background=asked.background
                )
                self.store.put(tenant, stored)

        return ResponseAnswer(
            head=ResponseHead(
                id=generation.id,
                created_s=int(self._unix_s()),
                model=self._plane.model_name,
                repeated={
                    **asked.repeated,
                    "temperature": sampling.temperature,
                    "top_p": sampling.top_p,
                },
            ),
            prepared=prepared,
            plane=self._plane,
            metrics=self._metrics,
            on_end=keep,
            unix_s=self._unix_s,
        )

    def _start(
        self, answer: ResponseAnswer, before: tuple[StoredItem, ...], tenant: str
    ) -> Response:
        """Makes the response in a task, which ends with the generation at the latest."""
        task = asyncio.create_task(self._run(answer))
        running = _Background(tenant, answer.head, before, task)
        self._background[answer.head.id] = running
        return _json(running.stored().json)

    async def _run(self, answer: ResponseAnswer) -> None:
        try:
            await answer.whole()
        except JserveError as error:
            answer.fail(error)
        except asyncio.CancelledError:
            answer.cancel()
        except Exception:
            _log.exception("response %s", answer.head.id)
            answer.fail(EngineError("internal error; the log has it with the response's id"))
        finally:
            self._background.pop(answer.head.id, None)

    async def _stop(self, response_id: str) -> None:
        running = self._background.get(response_id)
        if running is not None:
            running.task.cancel()
            await asyncio.wait([running.task])

    def _find(self, request: Request) -> StoredResponse:
        response_id: str = request.path_params["id"]
        tenant = request.scope["caller"].name
        running = self._background.get(response_id)
        if running is not None and running.tenant == tenant:
            return running.stored()
        found = self.store.get(tenant, response_id)
        if found is None:
            raise not_found(response_id, self.store)
        return found


def _json(encoded: bytes) -> Response:
    return Response(encoded, media_type="application/json")


def _place_after(items: Sequence[StoredItem], after: str | None) -> int:
    if after is None:
        return 0
    for place, item in enumerate(items, 1):
        if item.id == after:
            return place
    raise RequestError(f"after: no item {after[:100]!r} is in the list", param="after")


def _limit(given: str | None) -> int:
    if given is None:
        return _PAGE
    digits = given.isascii() and given.isdigit() and len(given) <= _MAX_PAGE_DIGITS
    if not digits or not 1 <= int(given) <= _MAX_PAGE:
        message = f"limit must be from 1 to {_MAX_PAGE}, not {given[:40]!r}"
        raise RequestError(message, param="limit")
    return int(given)
