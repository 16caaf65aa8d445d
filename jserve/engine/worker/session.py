"""The engine's side of `Engine/Session`: commands into an Inbox, events of an Outbox to gateways.

Part of the worker process. Of the engine's modules, this one and `group`'s leader and follower know
gRPC.
"""

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import grpc
import grpc.aio

from jserve.core.addresses import is_loopback
from jserve.core.errors import ConfigError, JserveError, RequestError
from jserve.core.request import EngineInfo, SequenceUpdate
from jserve.core.stats import EngineStats
from jserve.engine.inbox import Abort, Command, Inbox, Outbox, Submit
from jserve.proto import engine_pb2, engine_pb2_grpc
from jserve.proto.convert import (
    RequestReader,
    info_to_proto,
    rejection_to_proto,
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

    live: set["_Sequence"] = field(default_factory=set["_Sequence"])
    # Both by the gateway's id.
    updates: dict[str, SequenceUpdate] = field(default_factory=dict[str, SequenceUpdate])
    rejections: list[tuple[str, JserveError]] = field(default_factory=list[tuple[str, JserveError]])
    unsent: asyncio.Event = field(default_factory=asyncio.Event)
    closed: bool = False  # the gateway has ended its half of the stream
    reader: RequestReader = field(default_factory=RequestReader)

    def post(self, request_id: str, update: SequenceUpdate) -> None:
        """Keeps an update; a gateway that reads slowly gets those of a sequence merged."""
        unsent = self.updates.get(request_id)
        self.updates[request_id] = update if unsent is None else unsent.then(update)

    def drop(self, request_id: str) -> None:
        """Forgets what is unsent of a sequence."""
        self.updates.pop(request_id, None)
        self.rejections = [kept for kept in self.rejections if kept[0] != request_id]

    def take(self, stats: EngineStats) -> engine_pb2.SessionResponse:
        """One message with everything unsent."""
        self.unsent.clear()
        response = engine_pb2.SessionResponse(
            stats=stats_to_proto(stats),
            rejections=[rejection_to_proto(*rejection) for rejection in self.rejections],
        )
        updates_to_proto(self.updates, response)
        self.updates.clear()
        self.rejections.clear()
        return response


class _Sequence(NamedTuple):
    """A submitted sequence that has not ended.

    The loop may post of it after its gateway has aborted it, and used the id again. So each has an
    id of its own in the engine.
    """

    session: _Session
    request_id: str  # the gateway's
    engine_id: str


class EngineSessions(engine_pb2_grpc.EngineServicer):
    """Routes commands and events between any number of gateways and one engine loop."""

    def __init__(self, info: EngineInfo, inbox: Inbox, outbox: Outbox) -> None:
        self._info = info
        self._inbox = inbox
        self._outbox = outbox
        self._by_request_id: dict[str, _Sequence] = {}
        self._by_engine_id: dict[str, _Sequence] = {}
        self._serial = itertools.count()
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
            self._inbox.put(*(Abort(sequence.engine_id) for sequence in session.live))
            for sequence in list(session.live):
                self._forget(sequence)

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
            session.drop(message.abort)
            sequence = self._by_request_id.get(message.abort)
            if sequence is None or sequence.session is not session:
                return None  # finished meanwhile, or another gateway's
            self._forget(sequence)
            return Abort(sequence.engine_id)
        request = session.reader.read(message.submit)
        if request.id in self._by_request_id or request.id in session.updates:
            error = RequestError(f"request id {request.id!r} is in use", param="request_id")
            session.rejections.append((request.id, error))
            session.unsent.set()
            return None
        sequence = _Sequence(session, request.id, f"{request.id}#{next(self._serial)}")
        session.live.add(sequence)
        self._by_request_id[request.id] = self._by_engine_id[sequence.engine_id] = sequence
        return Submit(replace(request, id=sequence.engine_id))

    def deliver(self) -> None:
        """Sorts the events of the outbox by gateway; on the event loop."""
        events = self._outbox.take()
        self._stats = events.stats
        for update in events.updates:
            sequence = self._by_engine_id.get(update.request_id)
            if sequence is not None:
                sequence.session.post(sequence.request_id, update)
                if update.finish is not None:
                    self._forget(sequence)
        for engine_id, error in events.rejections:
            sequence = self._by_engine_id.get(engine_id)
            if sequence is not None:
                sequence.session.rejections.append((sequence.request_id, error))
                self._forget(sequence)
        for session in self._sessions:  # sessions without an update get the stats
            session.unsent.set()

    def _forget(self, sequence: _Sequence) -> None:
        sequence.session.live.discard(sequence)
        del self._by_request_id[sequence.request_id]
        del self._by_engine_id[sequence.engine_id]


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
