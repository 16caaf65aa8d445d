"""An `EngineClient` over `Engine/Session`: one stream for all, reconnected when it breaks."""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

from jserve.core.errors import EngineError, Overloaded, Unavailable
from jserve.core.request import EngineInfo, Request
from jserve.core.stats import EngineStats
from jserve.gateway.engine_client import LiveStreams, UpdateStream
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

logger = logging.getLogger(__name__)

_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_SESSION_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_SESSION_MESSAGE_BYTES),
    ("grpc.enable_http_proxy", 0),  # the engine is on loopback, whatever the environment says
    ("grpc.use_local_subchannel_pool", 1),  # a new channel must not inherit an old back-off
)
_RETRY_AFTER_S = 2.0  # an engine that restarts from a warm cache takes a few seconds
_HELLO_TIMEOUT_S = 5.0
_SLACK = 64  # room for aborts that the engine has not seen yet


@dataclass(frozen=True, slots=True)
class Abort:
    """A sequence to stop, by its name in the engine."""

    name: str


class GrpcEngineClient:
    """An `EngineClient` over gRPC, owned by one event loop; `start` connects and reconnects.

    The address may be told later, and again after each restart of the engine: `connect_to`.
    """

    def __init__(self, address: str | None, *, reconnect_s: float) -> None:
        self.info: EngineInfo | None = None
        self.stats = EngineStats()
        self._address = ""
        self._located = asyncio.Event()
        self._reconnect_s = reconnect_s
        self._streams = LiveStreams()
        self._outgoing: asyncio.Queue[Request | Abort] | None = None
        self._connected = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        if address is not None:
            self.connect_to(address)

    @property
    def ready(self) -> bool:
        return self._outgoing is not None

    def start(self) -> None:
        """Begins to connect; returns at once."""
        self._task = asyncio.get_running_loop().create_task(self._stay_connected())

    def connect_to(self, address: str) -> None:
        """The next connection goes to `address`; one that stands is kept until it breaks."""
        self._address = address
        self._located.set()

    async def wait_ready(self) -> None:
        """Returns once the engine has introduced itself."""
        await self._connected.wait()

    async def close(self) -> None:
        """Drops the connection; what still ran gets an EngineError."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    def submit(self, requests: Sequence[Request]) -> UpdateStream:
        if self._outgoing is None or self.info is None:
            raise Unavailable(
                "the engine is starting or restarting; try again", retry_after_s=_RETRY_AFTER_S
            )
        room = self.info.num_slots + self.info.max_queue + _SLACK - len(self._streams)
        if len(requests) > room:
            # The engine would say so itself, but one that has stalled cannot.
            raise Overloaded(
                f"{len(self._streams)} sequences are in flight; try again", retry_after_s=1.0
            )
        stream, named = self._streams.open(self, requests)
        for request in named:
            self._outgoing.put_nowait(request)
        return stream

    def abort(self, request_id: str) -> None:
        name = self._streams.close(request_id)
        if name is not None and self._outgoing is not None:
            self._outgoing.put_nowait(Abort(name))

    async def _stay_connected(self) -> None:
        try:
            while True:
                await self._located.wait()
                # A fresh channel has no back-off of gRPC's and no stale socket.
                async with grpc.aio.insecure_channel(self._address, _OPTIONS) as channel:
                    try:
                        await self._session(engine_pb2_grpc.EngineStub(channel))
                        reason = "the engine closed the session"
                    except TimeoutError:
                        reason = "the process that listens there does not answer"
                    except grpc.aio.AioRpcError as error:
                        reason = f"{error.code().name}: {error.details()}"
                if self._outgoing is not None:
                    logger.warning("lost the engine at %s: %s", self._address, reason)
                self._disconnect()
                await asyncio.sleep(self._reconnect_s)
        finally:
            self._disconnect()

    async def _session(self, stub: Any) -> None:
        """Serves one connection until it ends."""
        call = stub.Session()
        writing = None
        try:
            messages = aiter(call)
            # After a crash another process may hold the port until the new one is known.
            async with asyncio.timeout(_HELLO_TIMEOUT_S):
                hello = await anext(messages, None)
            if hello is None:
                return
            self.info = info_from_proto(hello.hello)
            self.stats = stats_from_proto(hello.stats)
            self._outgoing = asyncio.Queue()
            self._connected.set()
            logger.info("connected to the engine at %s: %s", self._address, self.info)
            writing = asyncio.create_task(_write(call, self._outgoing))
            async for message in messages:
                self._dispatch(message)
        finally:
            if writing is not None:
                writing.cancel()
            call.cancel()

    def _dispatch(self, message: engine_pb2.SessionResponse) -> None:
        self.stats = stats_from_proto(message.stats)
        for update in message.updates:
            self._streams.post(update_from_proto(update))
        for rejection in message.rejections:
            self._streams.reject(rejection.request_id, error_from_rejection(rejection))

    def _disconnect(self) -> None:
        """Tells everybody who waits, at once; there is nothing to wait for."""
        self._outgoing = None
        self._connected.clear()
        self._streams.fail_all(
            EngineError("the engine stopped while it worked on the request; send it again")
        )


async def _write(call: Any, outgoing: asyncio.Queue[Request | Abort]) -> None:
    """Sends what is queued; makes each message only then, since a large one takes a while."""
    pauses, writer = Pauses(), RequestWriter()
    while True:
        item = await outgoing.get()
        pauses.start()
        if isinstance(item, Abort):
            message = engine_pb2.SessionRequest(abort=item.name)
        else:
            message = engine_pb2.SessionRequest(submit=writer.write(item))
        await pauses.end()
        try:
            await call.write(message)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            return  # the reading side reports why
