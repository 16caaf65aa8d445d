"""Many generations over one gRPC call: `Inference/GenerateStream`."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass

import grpc

from jserve.core.errors import JserveError, Overloaded, RequestError
from jserve.gateway.grpc_bounds import TooManyParts
from jserve.gateway.grpc_errors import make_failure
from jserve.gateway.grpc_messages import parse_generation, responses
from jserve.gateway.metrics import GatewayMetrics
from jserve.gateway.request_plane import OutputStream, RequestPlane
from jserve.gateway.tenants import Caller
from jserve.proto import inference_pb2

Write = Callable[[bytes], Awaitable[None]]


@dataclass(slots=True)
class _Live:
    """A generation of the call, with its output stream once it runs."""

    deltas: OutputStream | None = None
    cancelled: bool = False


class GenerateStream:
    """State of one call. Every generation has its own task; they take turns writing."""

    def __init__(
        self,
        plane: RequestPlane,
        metrics: GatewayMetrics,
        write: Write,
        caller: Caller,
        time_left_s: Callable[[], float | None] = lambda: None,
    ) -> None:
        """`time_left_s` returns the seconds until the call's deadline; None if it has none."""
        self._plane = plane
        self._caller = caller
        self._metrics = metrics
        self._unlocked_write = write
        self._time_left_s = time_left_s
        self._write_lock = asyncio.Lock()
        self._live: dict[str, _Live] = {}

    async def serve(
        self, requests: AsyncIterator[inference_pb2.GenerateStreamRequest | TooManyParts]
    ) -> None:
        """Returns when the client has closed its half and every generation has ended."""
        async with asyncio.TaskGroup() as tasks:
            async for message in requests:
                if isinstance(message, TooManyParts):
                    await self._fail("", make_failure(message.error))
                    continue
                match message.WhichOneof("kind"):
                    case "start":
                        refusal = self._admit(message.start.request_id)
                        if refusal is None:
                            tasks.create_task(self._generate(message.start))
                        else:
                            await self._fail(message.start.request_id, refusal)
                    case "cancel":
                        self._cancel(message.cancel)
                    case _:
                        # Raising would end the call's other generations as well.
                        error = RequestError("neither start nor cancel is set", param="kind")
                        await self._fail("", make_failure(error))

    def _admit(self, request_id: str) -> inference_pb2.Failure | None:
        """Registers a request, or returns why it is refused."""
        if not request_id:
            return make_failure(RequestError("request_id is empty; it names the answers"))
        if request_id in self._live:
            # A code of its own, since the generation that has the id has not failed.
            failure = make_failure(
                RequestError(f"request_id {request_id!r} is in use on this call")
            )
            failure.code = grpc.StatusCode.ALREADY_EXISTS.value[0]  # pyright: ignore
            return failure
        limit = self._plane.config.max_streams_per_call
        if len(self._live) >= limit:
            return make_failure(
                Overloaded(f"{limit} requests are in flight on this call", retry_after_s=1.0)
            )
        self._live[request_id] = _Live()
        return None

    def _cancel(self, request_id: str) -> None:
        live = self._live.get(request_id)
        if live is None:
            return  # it has ended; the client did not know yet
        live.cancelled = True
        if live.deltas is not None:
            live.deltas.close()

    async def _generate(self, message: inference_pb2.GenerateRequest) -> None:
        started_s = self._plane.clock.now_s()
        live = self._live[message.request_id]
        try:
            parsed = await parse_generation(self._plane, message, message.request_id, self._caller)
            running = self._plane.run(
                parsed.generation, self._metrics, deadline_s=self._time_left_s()
            )
            async with aclosing(running) as deltas:
                live.deltas = deltas
                if live.cancelled:
                    deltas.close()
                async for response in responses(self._plane, parsed, deltas, started_s):
                    await self._write(response)
        except JserveError as error:
            await self._fail(message.request_id, make_failure(error))
        finally:
            del self._live[message.request_id]

    async def _fail(self, request_id: str, failure: inference_pb2.Failure) -> None:
        response = inference_pb2.GenerateResponse(request_id=request_id, error=failure)
        await self._write(response.SerializeToString())

    async def _write(self, response: bytes) -> None:
        async with self._write_lock:
            await self._unlocked_write(response)
