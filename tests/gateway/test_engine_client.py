"""Streams of an engine client: their updates, and those that come too late."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import grpc.aio
import pytest

from jserve.core.errors import RequestError
from jserve.core.request import FinishReason, Request, SequenceUpdate
from jserve.core.stats import EngineStats
from jserve.gateway.engine_client import LiveStreams, UpdateStream
from jserve.gateway.fake_engine import FakeEngine
from jserve.gateway.grpc_engine_client import GrpcEngineClient
from jserve.proto import engine_pb2, engine_pb2_grpc
from jserve.proto.convert import info_to_proto, stats_to_proto, updates_to_proto
from tests.gateway.fixtures import INFO, closing, unix_address


def request(request_id: str) -> Request:
    return Request(id=request_id, prompt=(7, 8))


class LateEngine(engine_pb2_grpc.EngineServicer):
    """Answers two submitted sequences in turn, the first of which was aborted meanwhile."""

    async def Session(  # noqa: N802  the name in the .proto
        self, request_iterator: AsyncIterator[engine_pb2.SessionRequest], context: Any
    ) -> None:
        stats = stats_to_proto(EngineStats())
        hello = engine_pb2.SessionResponse(hello=info_to_proto(INFO), stats=stats)
        await context.write(hello)
        names: list[str] = []
        async for message in request_iterator:
            if message.WhichOneof("kind") == "submit":
                names.append(message.submit.id)
            if len(names) == 2:
                late, due = names
                for update in (
                    SequenceUpdate(late, (1, 2), FinishReason.STOP),
                    SequenceUpdate(due, (3,), FinishReason.STOP),
                ):
                    response = engine_pb2.SessionResponse(stats=stats)
                    updates_to_proto({update.request_id: update}, response)
                    await context.write(response)


async def tokens_of(stream: UpdateStream) -> list[int]:
    return [token async for update in stream for token in update.tokens]


def test_a_late_update_does_not_reach_a_newer_sequence_of_the_same_id() -> None:
    async def main() -> None:
        server = grpc.aio.server()
        engine_pb2_grpc.add_EngineServicer_to_server(LateEngine(), server)
        address = unix_address()
        server.add_insecure_port(address)
        await server.start()
        try:
            async with closing(GrpcEngineClient(address, reconnect_s=0.02)) as client:
                client.start()
                await asyncio.wait_for(client.wait_ready(), 5)
                aborted = client.submit([request("same")])
                aborted.close()
                newer = client.submit([request("same")])
                assert await asyncio.wait_for(tokens_of(newer), 5) == [3]
                assert await tokens_of(aborted) == []
        finally:
            await server.stop(0)

    asyncio.run(main())


def test_the_id_of_a_live_sequence_is_refused() -> None:
    async def main() -> None:
        async with closing(FakeEngine(INFO, reply=lambda _: [5, 6])) as engine:
            first = engine.submit([request("same")])
            with pytest.raises(RequestError, match="'same' is in use"):
                engine.submit([request("other"), request("same")])
            assert await tokens_of(first) == [5, 6]
            assert await tokens_of(engine.submit([request("same")])) == [5, 6]
            assert await tokens_of(engine.submit([request("other")])) == [5, 6]

    asyncio.run(main())


def test_an_id_given_twice_at_once_is_refused_and_starts_nothing() -> None:
    async def main() -> None:
        async with closing(FakeEngine(INFO, reply=lambda _: [5, 6])) as engine:
            with pytest.raises(RequestError, match="'same' is in use"):
                engine.submit([request("other"), request("same"), request("same")])
            both = engine.submit([request("other"), request("same")])
            assert sorted(await tokens_of(both)) == [5, 5, 6, 6]

    asyncio.run(main())


def test_a_refused_group_leaves_no_live_sequence() -> None:
    async def main() -> None:
        streams = LiveStreams()
        async with closing(FakeEngine(INFO, reply=lambda _: [5])) as engine:
            with pytest.raises(RequestError, match="'same' is in use"):
                streams.open(engine, [request("same"), request("same")])
        assert len(streams) == 0
        assert streams.close("same") is None

    asyncio.run(main())


@pytest.mark.parametrize("num_reads", [1, 3])
def test_cached_tokens_come_once_however_updates_are_merged(num_reads: int) -> None:
    async def main() -> None:
        engine = FakeEngine(INFO)
        streams = LiveStreams()
        stream, (named,) = streams.open(engine, [request("a")])
        updates: list[SequenceUpdate] = []
        for token, cached in ((1, 32), (2, 0), (3, 0)):
            end = FinishReason.LENGTH if token == 3 else None
            streams.post(SequenceUpdate(named.id, (token,), end, cached_tokens=cached))
            if num_reads == 3:
                updates.append(await anext(stream))
        updates += [update async for update in stream]
        assert len(updates) == num_reads
        assert [update.cached_tokens for update in updates] == [32, 0, 0][:num_reads]

    asyncio.run(main())


def test_a_resumed_sequence_tells_what_its_first_engine_found() -> None:
    """An engine that dies before its first update has told nothing; the next one's counts."""

    async def main() -> None:
        streams = LiveStreams()
        stream, (named, _) = streams.open(FakeEngine(INFO), [request("a"), request("b")])
        streams.post(SequenceUpdate(named.id, (1,), cached_tokens=16))
        streams.lose(0.0)
        for resumed in streams.resume():
            streams.post(SequenceUpdate(resumed.id, (2,), FinishReason.LENGTH, cached_tokens=48))
        found: dict[str, int] = {}
        async for update in stream:
            found[update.request_id] = found.get(update.request_id, 0) + update.cached_tokens
        assert found == {"a": 16, "b": 48}

    asyncio.run(main())


def test_a_resumed_request_keeps_its_deadline() -> None:
    async def main() -> None:
        async with closing(FakeEngine(INFO)) as engine:
            streams = LiveStreams()
            asked = [replace(request("a"), deadline_s=10.0), request("b")]
            _, sent = streams.open(engine, asked, 100.0)
            assert [it.deadline_s for it in sent] == [10.0, None]
            assert [it.deadline_s for it in streams.resume(107.0)] == [3.0, None]
            assert [it.deadline_s for it in streams.resume(109.0)] == [1.0, None]
            assert [it.deadline_s for it in streams.resume(120.0)] == [0.0, None]

    asyncio.run(main())
