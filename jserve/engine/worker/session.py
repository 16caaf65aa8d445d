"""The engine's side of `Engine/Session`: commands into an Inbox, events of an Outbox to gateways.

Part of the worker process. Here is the engine's border: a peer over TCP must prove that it holds
the engine's token, and a request that could not run is rejected before the loop sees it. Of the
engine's modules, this one, `session_server` and `group`'s leader and follower know gRPC.
"""

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import grpc

from jserve.core.clock import Clock, WallClock
from jserve.core.errors import EngineError, JserveError, RequestError
from jserve.core.request import EngineInfo, Request, SequenceUpdate
from jserve.core.request_check import check_request
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
from jserve.proto.session_auth import (
    NONCE_KEY,
    PROOF_KEY,
    Side,
    is_proof,
    new_nonce,
    nonce_of,
    proof,
)
from jserve.scheduler.constraint import Constraint

logger = logging.getLogger(__name__)

_PROOF_TIMEOUT_S = 5.0
_NUM_COMPILERS = 2  # of grammars at a time; beside the loop they take its time

Constrain = Callable[[Request], Constraint | None]


@dataclass(eq=False, slots=True)
class _Session:
    """One gateway: what it runs, and what it has not been told yet. Owned by the event loop."""

    live: set["_Sequence"] = field(default_factory=set["_Sequence"])
    # Both by the gateway's id.
    updates: dict[str, SequenceUpdate] = field(default_factory=dict[str, SequenceUpdate])
    rejections: list[tuple[str, JserveError]] = field(default_factory=list[tuple[str, JserveError]])
    heartbeat: engine_pb2.Heartbeat | None = None  # due since the last message
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
            heartbeat=self.heartbeat,
        )
        updates_to_proto(self.updates, response)
        self.updates.clear()
        self.rejections.clear()
        self.heartbeat = None
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

    def __init__(
        self,
        info: EngineInfo,
        inbox: Inbox,
        outbox: Outbox,
        token: str | None = None,
        *,
        clock: Clock | None = None,
        is_compiling: Callable[[], bool] = lambda: False,
        constrain: Constrain | None = None,
    ) -> None:
        """With a `token`, only a gateway that holds it is served.

        `constrain` is called in threads of this object; without it, constraints are refused.
        """
        self._constrain = constrain
        self._threads = ThreadPoolExecutor(_NUM_COMPILERS, thread_name_prefix="grammars")
        self._compiling = set[asyncio.Task[None]]()
        self._clock = clock or WallClock()
        self._is_compiling = is_compiling
        self._changed_s = self._clock.now_s()  # when the number of steps last changed
        self._info = info
        self._token = token
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
        if self._token is not None and not await _is_known(self._token, request_iterator, context):
            logger.warning("refused a gateway without the engine's token: %s", context.peer())
            words = "this engine serves gateways that hold its token; see --engine_token_file"
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, words)
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
        kind = message.WhichOneof("kind")
        if kind == "abort":
            session.drop(message.abort)
            sequence = self._by_request_id.get(message.abort)
            if sequence is None or sequence.session is not session:
                return None  # finished meanwhile, or another gateway's
            self._forget(sequence)
            return Abort(sequence.engine_id)
        if kind != "submit":
            return None  # of a newer version
        request = session.reader.read(message.submit)
        try:
            if request.id in self._by_request_id or request.id in session.updates:
                raise RequestError(f"request id {request.id!r} is in use", param="request_id")
            check_request(request, self._info)
        except RequestError as error:
            session.rejections.append((request.id, error))
            session.unsent.set()
            return None
        sequence = _Sequence(session, request.id, f"{request.id}#{next(self._serial)}")
        session.live.add(sequence)
        self._by_request_id[request.id] = self._by_engine_id[sequence.engine_id] = sequence
        request = replace(request, id=sequence.engine_id)
        if request.constraint is None:
            return Submit(request)
        task = asyncio.create_task(self._submit_bound(request))
        self._compiling.add(task)
        task.add_done_callback(self._compiling.discard)
        return None

    async def _submit_bound(self, request: Request) -> None:
        """Submits a request once its constraint is compiled, if it is still wanted then."""
        error: JserveError | None = None
        constraint = None
        try:
            loop = asyncio.get_running_loop()
            constraint = await loop.run_in_executor(self._threads, self._make, request)
        except JserveError as refused:
            error = refused
        except Exception as failed:  # of a library: the client must not wait for ever
            logger.exception("a constraint could not be made")
            error = EngineError(f"the constraint could not be made: {failed}")
        sequence = self._by_engine_id.get(request.id)
        if sequence is None:  # aborted meanwhile
            return
        if error is None:
            self._inbox.put(Submit(request, constraint))
        else:
            sequence.session.rejections.append((sequence.request_id, error))
            sequence.session.unsent.set()
            self._forget(sequence)

    def deliver(self) -> None:
        """Sorts the events of the outbox by gateway; on the event loop."""
        events = self._outbox.take()
        if events.stats.num_steps != self._stats.num_steps:
            self._changed_s = self._clock.now_s()
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

    def beat(self) -> None:
        """Tells every gateway how far the loop is, though it may stand still; on the event loop."""
        heartbeat = engine_pb2.Heartbeat(
            num_steps=self._stats.num_steps,
            unchanged_s=self._clock.now_s() - self._changed_s,
            num_running=self._stats.num_running,
            compiling=self._is_compiling(),
        )
        for session in self._sessions:
            session.heartbeat = heartbeat
            session.unsent.set()

    def _make(self, request: Request) -> Constraint | None:
        if self._constrain is None:
            raise RequestError("this engine knows no constraints", param="grammar")
        if request.id not in self._by_engine_id:  # aborted while it waited for a thread
            return None
        return self._constrain(request)

    def close(self) -> None:
        """Compiles nothing more."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _forget(self, sequence: _Sequence) -> None:
        sequence.session.live.discard(sequence)
        del self._by_request_id[sequence.request_id]
        del self._by_engine_id[sequence.engine_id]


async def _is_known(
    token: str, requests: AsyncIterator[engine_pb2.SessionRequest], context: Any
) -> bool:
    """Proves that this engine holds `token`, and whether the gateway does; see `session_auth`."""
    gateway_nonce = nonce_of(context.invocation_metadata())
    if gateway_nonce is None:
        return False
    nonce = new_nonce()
    own = proof(token, Side.ENGINE, gateway_nonce, nonce)
    await context.send_initial_metadata(((NONCE_KEY, nonce), (PROOF_KEY, own)))
    try:
        async with asyncio.timeout(_PROOF_TIMEOUT_S):
            first = await anext(requests, None)
    except TimeoutError:
        return False
    given = None if first is None else first.proof
    return is_proof(given, token, Side.GATEWAY, gateway_nonce, nonce)
