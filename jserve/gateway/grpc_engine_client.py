"""An `EngineClient` over `Engine/Session`: one stream for all, reconnected when it breaks."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

from jserve.core.addresses import check_engine_address, socket_path
from jserve.core.errors import EngineError, JserveError, Overloaded, Unavailable
from jserve.core.private_path import why_folder_not_private
from jserve.core.request import EngineInfo, FinishReason, Request
from jserve.core.stats import EngineStats
from jserve.gateway.engine_client import LiveStreams, UpdateStream
from jserve.gateway.engine_watch import EngineWatch, Verdict
from jserve.gateway.pauses import Pauses
from jserve.proto import engine_pb2, engine_pb2_grpc
from jserve.proto.convert import (
    RequestWriter,
    error_from_rejection,
    info_from_proto,
    stats_from_proto,
    update_from_proto,
)
from jserve.proto.limits import MAX_SESSION_MESSAGE_BYTES
from jserve.proto.session_auth import (
    NONCE_KEY,
    Side,
    is_proof,
    new_nonce,
    nonce_of,
    proof,
    proof_of,
)

logger = logging.getLogger(__name__)

_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_SESSION_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_SESSION_MESSAGE_BYTES),
    ("grpc.enable_http_proxy", 0),  # the engine is on loopback, whatever the environment says
    ("grpc.use_local_subchannel_pool", 1),  # a new channel must not inherit an old back-off
)
_RETRY_AFTER_S = 2.0  # an engine that restarts from a warm cache takes a few seconds
_HELLO_TIMEOUT_S = 5.0
_CLOSED = "the engine closed the session"
_SLACK = 64  # room for aborts that the engine has not seen yet


@dataclass(frozen=True, slots=True)
class Abort:
    """A sequence to stop, by its name in the engine."""

    name: str


class GrpcEngineClient:
    """An `EngineClient` over gRPC, owned by one event loop; `start` connects and reconnects.

    The address may be told later, and again after each restart of the engine: `connect_to`. Only an
    engine that others cannot stand in for is talked to: behind a Unix socket in a folder of this
    user's, or over TCP with a proof that it holds `token`.
    """

    def __init__(
        self,
        address: str | None,
        *,
        reconnect_s: float,
        resume_wait_s: float = 0.0,
        token: str | None = None,
        watch: EngineWatch | None = None,
        on_hang: Callable[[], None] | None = None,
    ) -> None:
        """When the engine is gone, sequences wait for the next one, which continues them.

        New sequences wait with them, unless no engine was ever there. Sequences fail after
        `resume_wait_s` without an engine, or when they have lost three engines since their last
        token. `on_hang` is called when `watch` finds that the engine hangs, to end it. Without
        `on_hang` nobody can: then the engine gets no new work until it moves again.
        """
        self.info: EngineInfo | None = None
        self.stats = EngineStats()
        self._address: str | None = None
        self._token = token
        self._watch = watch or EngineWatch()
        self._on_hang = on_hang
        self._gave_up = False  # what the engine had to do, since it hangs
        self._located = asyncio.Event()
        self._attempt: asyncio.Task[str] | None = None
        self._reconnect_s = reconnect_s
        self._resume_wait_s = resume_wait_s
        self._streams = LiveStreams()
        self._outgoing: asyncio.Queue[Request | Abort] | None = None
        self._connected = asyncio.Event()
        self._last_reason = ""  # for which no connection was made; logged when it changes
        self._task: asyncio.Task[None] | None = None
        self._watching: asyncio.Task[None] | None = None
        if address is not None:
            self.connect_to(address)

    @property
    def ready(self) -> bool:
        return self._outgoing is not None and self._watch.verdict is Verdict.FINE

    @property
    def seconds_since_step(self) -> float:
        """Seconds for which the engine has had work and has ended no step."""
        return self._watch.standing_s

    def start(self) -> None:
        """Begins to connect; returns at once."""
        loop = asyncio.get_running_loop()
        self._task = loop.create_task(self._stay_connected())
        self._watching = loop.create_task(self._keep_watch())

    def connect_to(self, address: str | None) -> None:
        """Connects to `address`, and drops a connection to another; None: the engine is gone.

        Raises ConfigError for an address that anybody might listen on.
        """
        if address is not None:
            check_engine_address(address, has_token=self._token is not None)
        if address == self._address:
            return
        self._address = address
        if self._attempt is not None:
            self._attempt.cancel()
        if address is None:
            self._located.clear()
        else:
            self._located.set()

    async def wait_ready(self) -> None:
        """Returns once the engine has introduced itself."""
        await self._connected.wait()

    async def close(self) -> None:
        """Drops the connection; what still ran gets Unavailable."""
        tasks = [task for task in (self._task, self._watching) if task is not None]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        self._streams.fail_all(_stopped())

    def submit(self, requests: Sequence[Request]) -> UpdateStream:
        outgoing = self._outgoing
        waits = outgoing is None and self._resume_wait_s > 0
        if self.info is None or not (self.ready or waits):
            raise Unavailable(
                "the engine is starting or restarting; try again", retry_after_s=_RETRY_AFTER_S
            )
        room = self.info.num_slots + self.info.max_queue + _SLACK - len(self._streams)
        if len(requests) > room:
            # The engine would say so itself, but one that has stalled cannot.
            raise Overloaded(
                f"{len(self._streams)} sequences are in flight; try again", retry_after_s=1.0
            )
        now_s = asyncio.get_running_loop().time()
        stream, named = self._streams.open(self, requests, now_s, lost=waits)
        if outgoing is not None:
            for request in named:
                outgoing.put_nowait(request)
        return stream

    def abort(self, request_id: str) -> None:
        name = self._streams.close(request_id)
        if name is not None and self._outgoing is not None:
            self._outgoing.put_nowait(Abort(name))

    async def _stay_connected(self) -> None:
        try:
            while True:
                await self._located.wait()
                assert self._address is not None
                address = self._address
                self._attempt = asyncio.create_task(self._connect(address))
                await asyncio.wait({self._attempt})
                if self._attempt.cancelled():
                    reason = "the engine is gone, or elsewhere"
                else:
                    reason = self._attempt.result()
                if self._outgoing is not None:
                    logger.warning("lost the engine at %s: %s", address, reason)
                elif reason != self._last_reason:
                    logger.info("cannot reach the engine at %s: %s", address, reason)
                self._last_reason = reason
                self._disconnect()
                if address == self._address:
                    await asyncio.sleep(self._reconnect_s)
        finally:
            if self._attempt is not None:
                self._attempt.cancel()
                await asyncio.wait({self._attempt})
            self._disconnect()

    async def _connect(self, address: str) -> str:
        """Serves one connection until it ends; returns why it did."""
        path = socket_path(address)
        if path is not None and (reason := why_folder_not_private(path.parent)):
            return f"{path.parent}: {reason}; only a folder of mode 0700 is trusted"
        # A fresh channel has no back-off of gRPC's and no stale socket.
        async with grpc.aio.insecure_channel(address, _OPTIONS) as channel:
            try:
                token = None if path is not None else self._token
                return await self._session(engine_pb2_grpc.EngineStub(channel), address, token)
            except TimeoutError:
                return "the process that listens there does not answer"
            except grpc.aio.AioRpcError as error:
                return f"{error.code().name}: {error.details()}"
            except Exception as error:  # of an engine that speaks otherwise; the next one may not
                logger.exception("the engine at %s is not understood", address)
                return f"{type(error).__name__}: {error}"

    async def _session(self, stub: Any, address: str, token: str | None) -> str:
        nonce = new_nonce()
        call = stub.Session() if token is None else stub.Session(metadata=((NONCE_KEY, nonce),))
        writing = None
        try:
            messages = aiter(call)
            # After a crash another process may hold the port until the new one is known.
            async with asyncio.timeout(_HELLO_TIMEOUT_S):
                if token is not None and not await _is_known(call, token, nonce):
                    return "the process that listens there does not hold the engine's token"
                hello = await anext(messages, None)
            if hello is None:
                return _CLOSED
            known, self.info = self.info, info_from_proto(hello.hello)
            self.stats = stats_from_proto(hello.stats)
            self._watch.reset()
            self._gave_up = False
            self._outgoing = asyncio.Queue()
            self._resume(equal=known is None or _gives_equal_tokens(known, self.info))
            self._connected.set()
            self._last_reason = ""
            logger.info("connected to the engine at %s: %s", address, self.info)
            writing = asyncio.create_task(_write(call, self._outgoing, self._streams.reject))
            writing.add_done_callback(lambda task: _end_session(call, task))
            async for message in messages:
                self._dispatch(message)
            return _CLOSED
        finally:
            if writing is not None:
                writing.cancel()
            call.cancel()

    async def _keep_watch(self) -> None:
        """Acts on an engine that hangs; its verdict alone stops new work."""
        clock, suspected = asyncio.get_running_loop().time, False
        while True:
            await asyncio.sleep(self._watch.tick_s)
            self._streams.expire(clock() - self._resume_wait_s, _stopped())
            if self._outgoing is None:
                continue
            verdict = self._watch.tick(clock(), busy=len(self._streams) > 0)
            if suspected is (verdict is Verdict.FINE):
                suspected = not suspected
                if suspected:
                    logger.warning("the engine gets no more work: %s", self._watch.reason)
                else:
                    self._gave_up = False
                    logger.info("the engine gets on with its work")
            if verdict is Verdict.HUNG and not self._gave_up:
                self._give_up()

    def _give_up(self) -> None:
        """Tells everybody who waits for an engine that hangs, and has it ended."""
        self._gave_up = True
        logger.error("the engine hangs and is given up: %s", self._watch.reason)
        self._streams.abort_all(_stopped())
        if self._on_hang is not None:
            self.connect_to(None)
            self._on_hang()

    def _dispatch(self, message: engine_pb2.SessionResponse) -> None:
        self.stats = stats_from_proto(message.stats)
        beats = message.HasField("heartbeat")
        steps = max(self.stats.num_steps, message.heartbeat.num_steps)
        self._watch.heard(steps, compiling=message.heartbeat.compiling if beats else None)
        for update in map(update_from_proto, message.updates):
            if update.finish is FinishReason.ERROR:  # the engine ends, and says so first
                logger.warning("the engine gives a sequence up: %s", update.error)
                self._lose(update.request_id)
            else:
                self._streams.post(update)
        for rejection in message.rejections:
            self._streams.reject(rejection.request_id, error_from_rejection(rejection))

    def _disconnect(self) -> None:
        """Keeps what the engine worked on for the next one."""
        self._outgoing = None
        self._connected.clear()
        self._lose()

    def _lose(self, name: str | None = None) -> None:
        """Notes that nobody works on a sequence, or on any; some have waited too long already."""
        now_s = asyncio.get_running_loop().time()
        self._streams.lose(now_s, name)
        self._streams.expire(now_s - self._resume_wait_s, _stopped())

    def _resume(self, *, equal: bool) -> None:
        """Gives everything to the new engine; what has begun only if it gives `equal` tokens."""
        assert self._outgoing is not None
        if not equal:
            words = "another engine has taken over, which would answer otherwise; send it again"
            self._streams.fail_begun(Unavailable(words, retry_after_s=_RETRY_AFTER_S))
        requests = self._streams.resume(asyncio.get_running_loop().time())
        for request in requests:
            self._outgoing.put_nowait(request)
        if requests:
            logger.info("%d sequences go on in the new engine", len(requests))


def _stopped() -> Unavailable:
    words = "the engine stopped before it ended the request; send it again"
    return Unavailable(words, retry_after_s=_RETRY_AFTER_S)


def _gives_equal_tokens(one: EngineInfo, other: EngineInfo) -> bool:
    """Whether sequences of one engine go on in the other as if nothing had happened."""

    def traits(info: EngineInfo) -> tuple[object, ...]:
        return info.model, info.numerics, info.vocab, info.max_model_len, info.eos_token_ids

    return traits(one) == traits(other)


def _end_session(call: Any, writing: asyncio.Task[None]) -> None:
    """Cancels the call of a writer that has ended: what is queued would never be sent."""
    if not writing.cancelled() and (error := writing.exception()) is not None:
        logger.error("the session ends, since nothing can be sent to the engine", exc_info=error)
    call.cancel()  # does nothing if the call has ended already


async def _write(
    call: Any,
    outgoing: asyncio.Queue[Request | Abort],
    reject: Callable[[str, JserveError], None],
) -> None:
    """Sends what is queued; makes each message only then, since a large one takes a while.

    A sequence whose message cannot be made gets an EngineError by `reject`; the others go on.
    """
    pauses, writer = Pauses(), RequestWriter()
    while True:
        item = await outgoing.get()
        pauses.start()
        message = None
        try:
            if isinstance(item, Abort):
                message = engine_pb2.SessionRequest(abort=item.name)
            else:
                message = engine_pb2.SessionRequest(submit=writer.write(item))
        except Exception as error:  # whatever it is, it concerns this sequence alone
            name = item.name if isinstance(item, Abort) else item.id
            logger.exception("no message to the engine can be made of %r", name)
            words = f"the request cannot be sent to the engine: {type(error).__name__}: {error}"
            reject(name, EngineError(words))
        await pauses.end()
        if message is None:
            continue
        try:
            await call.write(message)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return  # the reading side reports why


async def _is_known(call: Any, token: str, nonce: str) -> bool:
    """Whether the engine has proved that it holds `token`; if so, proves the same to it."""
    metadata = await call.initial_metadata()
    engine_nonce = nonce_of(metadata)
    if engine_nonce is None or not is_proof(
        proof_of(metadata), token, Side.ENGINE, nonce, engine_nonce
    ):
        return False
    own = proof(token, Side.GATEWAY, nonce, engine_nonce)
    await call.write(engine_pb2.SessionRequest(proof=own))
    return True
