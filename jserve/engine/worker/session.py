"""The engine's side of `Engine/Session`: commands into an Inbox, events of an Outbox to gateways.

Part of the worker process: the only modules of the engine that know gRPC are this one and the
worker's.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio

from jserve.core.addresses import is_loopback
from jserve.core.errors import ConfigError, JserveError, RequestError
from jserve.core.request import EngineInfo, SequenceUpdate
from jserve.core.stats import EngineStats
from jserve.engine.inbox import Abort, Command, Inbox, Outbox, Submit
from jserve.proto import engine_pb2, engine_pb2_grpc
from jserve.proto.convert import (
    info_to_proto,
    rejection_to_proto,
    request_from_proto,
    stats_to_proto,
    updates_to_proto,
)
from jserve.proto.limits import MAX_SESSION_MESSAGE_BYTES

logger = logging.getLogger(__name__)

_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_SESSION_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_SESSION_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),  # a second engine on the port is an error, not a lottery
)


@dataclass(eq=False, slots=True)
class _Session:
    """One gateway: what it runs, and what it has not been told yet. Owned by the event loop."""

    live: set[str] = field(default_factory=set[str])
    updates: dict[str, SequenceUpdate] = field(default_factory=dict[str, SequenceUpdate])
    rejections: list[tuple[str, JserveError]] = field(default_factory=list[tuple[str, JserveError]])
    unsent: asyncio.Event = field(default_factory=asyncio.Event)
    closed: bool = False  # the gateway has ended its half of the stream

    def post(self, update: SequenceUpdate) -> None:
        """Keeps an update; a gateway that reads slowly gets those of a sequence merged."""
        unsent = self.updates.get(update.request_id)
        self.updates[update.request_id] = update if unsent is None else unsent.then(update)

    def take(self, stats: EngineStats) -> engine_pb2.SessionResponse:
        """One message with everything unsent."""
        self.unsent.clear()
        response = engine_pb2.SessionResponse(
            stats=stats_to_proto(stats),
            rejections=[rejection_to_proto(*rejection) for rejection in self.rejections],
        )
        updates_to_proto(self.updates.values(), response)
        self.updates.clear()
        self.rejections.clear()
        return response


class EngineSessions(engine_pb2_grpc.EngineServicer):
    """Routes commands and events between any number of gateways and one engine loop."""

    def __init__(self, info: EngineInfo, inbox: Inbox, outbox: Outbox) -> None:
        self._info = info
        self._inbox = inbox
        self._outbox = outbox
        self._owners: dict[str, _Session] = {}  # by live request id
        self._sessions: set[_Session] = set()
        self._stats = EngineStats(free_slots=info.num_slots, free_pages=info.num_pages)

    async def Session(  # noqa: N802  the name in the .proto
        self,
        request_iterator: AsyncIterator[engine_pb2.SessionRequest],
        context: Any,
    ) -> None:
        """Serves one gateway until it goes; what it still ran is aborted."""
        session = _Session()
        self._sessions.add(session)
        reading = asyncio.create_task(self._read(request_iterator, session))
        try:
            await context.write(
                engine_pb2.SessionResponse(
                    hello=info_to_proto(self._info), stats=stats_to_proto(self._stats)
                )
            )
            while await session.unsent.wait() and not session.closed:
                await context.write(session.take(self._stats))
        finally:
            reading.cancel()
            self._sessions.discard(session)
            for request_id in session.live:
                del self._owners[request_id]
            self._inbox.put(*map(Abort, session.live))

    async def _read(
        self, requests: AsyncIterator[engine_pb2.SessionRequest], session: _Session
    ) -> None:
        try:
            async for message in requests:
                command = self._command(message, session)
                if command is not None:
                    self._inbox.put(command)
        finally:
            session.closed = True
            session.unsent.set()

    def _command(self, message: engine_pb2.SessionRequest, session: _Session) -> Command | None:
        if message.WhichOneof("kind") == "abort":
            if message.abort not in session.live:
                return None  # finished meanwhile, or another gateway's
            self._forget(message.abort, session)
            return Abort(message.abort)
        request = request_from_proto(message.submit)
        if request.id in self._owners:
            error = RequestError(f"request id {request.id!r} is in use", param="request_id")
            session.rejections.append((request.id, error))
            session.unsent.set()
            return None
        session.live.add(request.id)
        self._owners[request.id] = session
        return Submit(request)

    def deliver(self) -> None:
        """Sorts the events of the outbox by gateway; on the event loop."""
        events = self._outbox.take()
        self._stats = events.stats
        for update in events.updates:
            session = self._owners.get(update.request_id)
            if session is not None:
                session.post(update)
                if update.finish is not None:
                    self._forget(update.request_id, session)
        for request_id, error in events.rejections:
            session = self._owners.get(request_id)
            if session is not None:
                session.rejections.append((request_id, error))
                self._forget(request_id, session)
        for session in self._sessions:  # sessions without an update get the stats
            session.unsent.set()

    def _forget(self, request_id: str, session: _Session) -> None:
        session.live.discard(request_id)
        self._owners.pop(request_id, None)


class SessionServer:
    """The listening socket of an engine. Owned by the event loop it was started on."""

    def __init__(self, server: grpc.aio.Server, outbox: Outbox, port: int) -> None:
        self._server = server
        self._outbox = outbox
        self.port = port

    async def stop(self, grace_s: float = 0.0) -> None:
        """Takes no more gateways, waits `grace_s` for the present ones to go, drops the rest."""
        await self._server.stop(grace_s)
        self._outbox.detach()


async def serve_sessions(
    address: str, info: EngineInfo, inbox: Inbox, outbox: Outbox
) -> SessionServer:
    """Listens on `host:port` (port 0: any) until stopped. The loop may post at any time.

    There is no authentication: an address that is not a loopback one is a ConfigError.
    """
    host, _, port = address.rpartition(":")
    if not is_loopback(host):
        raise ConfigError(f"engine address {address!r}: must be on loopback, e.g. 127.0.0.1:8600")
    sessions = EngineSessions(info, inbox, outbox)
    server = grpc.aio.server(options=_OPTIONS)
    engine_pb2_grpc.add_EngineServicer_to_server(sessions, server)
    try:
        bound = server.add_insecure_port(address)
    except RuntimeError as error:
        raise ConfigError(f"engine address {address!r}: port {port} is taken") from error
    loop = asyncio.get_running_loop()
    outbox.attach(_Coalescer(loop, sessions.deliver).wake)
    await server.start()
    return SessionServer(server, outbox, bound)


class _Coalescer:
    """Calls back on the event loop, once for all wake-ups since the last call."""

    def __init__(self, loop: asyncio.AbstractEventLoop, callback: Any) -> None:
        self._loop = loop
        self._callback = callback
        self._scheduled = False

    def wake(self) -> None:
        """From any thread; calls are serialized by the outbox's lock."""
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon_threadsafe(self._run)

    def _run(self) -> None:
        self._scheduled = False  # before taking, so that later events schedule another call
        self._callback()
