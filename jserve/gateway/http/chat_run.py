"""Runs a prepared chat of one choice, for the APIs whose answers are one message."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from jserve.gateway.chat_reader import ChatDelta
from jserve.gateway.conversation import PreparedChat
from jserve.gateway.http.interleave import interleaved
from jserve.gateway.metrics import GatewayMetrics
from jserve.gateway.output import delta_bytes
from jserve.gateway.request_plane import RequestPlane


async def run_chat(
    plane: RequestPlane, metrics: GatewayMetrics, prepared: PreparedChat, *, kept: bool
) -> AsyncGenerator[ChatDelta, None]:
    """Yields the answer as it comes; closing the generator ends the sequence in the engine.

    `kept` says that the caller holds all of it until the end, which counts as unread output.
    Raises what `RequestPlane.run` and its stream do.
    """
    account = plane.buffers.open(prepared.generation.caller.name)
    try:
        reader = prepared.reader()
        stream = plane.run(prepared.generation, metrics, account)
        async with aclosing(interleaved([stream])) as deltas:
            async for _, delta in deltas:
                if kept:
                    account.add(delta_bytes(delta))
                yield reader.feed(delta)
    finally:
        account.close()
