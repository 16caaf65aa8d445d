"""Engine/Session over a real loopback socket: both of its ends, and what happens between."""

import asyncio
import socket
import threading
import time
from dataclasses import replace

import grpc
import grpc.aio
import pytest

from jserve.core.errors import Overloaded, RequestError, Unavailable
from jserve.core.request import FinishReason, Request, SamplingParams, SequenceUpdate
from jserve.core.stats import EngineStats
from jserve.engine.inbox import Abort, Inbox, Outbox, Submit
from jserve.engine.worker.session import _Session
from jserve.engine.worker.session_server import serve_sessions
from jserve.gateway import grpc_engine_client
from jserve.gateway.grpc_engine_client import GrpcEngineClient
from jserve.proto import engine_pb2, engine_pb2_grpc
from jserve.proto.convert import request_to_proto, update_from_proto
from tests.gateway.fixtures import INFO, LoopThread, closing, eventually, unix_address

TOKEN = "t" * 32


def request(request_id: str, max_tokens: int = 5, **sampling) -> Request:
    return Request(
        id=request_id, prompt=(7, 8, 9), sampling=SamplingParams(max_tokens=max_tokens, **sampling)
    )


async def connect(address: str) -> GrpcEngineClient:
    client = GrpcEngineClient(address, reconnect_s=0.02)
    client.start()
    await asyncio.wait_for(client.wait_ready(), 5)
    return client


async def collect(stream) -> list[SequenceUpdate]:
    return [update async for update in stream]


def merged(updates: list[SequenceUpdate]) -> SequenceUpdate:
    whole = updates[0]
    for update in updates[1:]:
        whole = whole.then(update)
    return whole


def test_request_goes_in_and_updates_come_out():
    async def main():
        with LoopThread().running() as loop:
            server = await serve_sessions(unix_address(), INFO, loop.inbox, loop.outbox)
            async with closing(await connect(server.address)) as client:
                assert client.info == INFO
                asked = request("a", logprobs=2, prompt_logprobs=1)
                whole = merged(await collect(client.submit([asked])))
                assert whole.tokens == (7, 8, 9, 7, 8)
                assert whole.finish is FinishReason.LENGTH
                assert whole.queue_s == 0.0
                assert [lp.token_id for lp in whole.logprobs] == [7, 8, 9, 7, 8]
                assert whole.logprobs[0].top == ((7, -0.5), (8, -1.0))
                assert whole.prompt_logprobs[0] is None
                assert [lp.token_id for lp in whole.prompt_logprobs[1:]] == [8, 9]
                assert client.stats.output_tokens == 5
            await server.stop()

    asyncio.run(main())


def test_many_sequences_share_the_stream():
    async def main():
        with LoopThread(replace(INFO, num_slots=8)).running() as loop:
            server = await serve_sessions(unix_address(), INFO, loop.inbox, loop.outbox)
            async with closing(await connect(server.address)) as client:
                streams = [client.submit([request(f"r{i}", i + 1)]) for i in range(10)]
                results = await asyncio.gather(*map(collect, streams))
                assert [len(merged(r).tokens) for r in results] == list(range(1, 11))
            await server.stop()

    asyncio.run(main())


def test_refusals_keep_their_type():
    async def main():
        with LoopThread().running() as loop:
            loop.paused.set()
            server = await serve_sessions(unix_address(), INFO, loop.inbox, loop.outbox)
            async with closing(await connect(server.address)) as client:
                held = [client.submit([request(f"r{i}")]) for i in range(12)]
                with pytest.raises(Overloaded, match="queue of 8") as refused:
                    await collect(client.submit([request("one-too-many")]))
                assert refused.value.retry_after_s == 1.0
                first, second = (added.request.id for added in loop.sequences.waiting[:2])
                loop.outbox.reject(first, RequestError("no such adapter"))
                with pytest.raises(RequestError, match="no such adapter"):
                    await collect(held[0])
                loop.outbox.reject(second, Unavailable("draining", retry_after_s=3))
                with pytest.raises(Unavailable, match="draining"):
                    await collect(held[1])
                with pytest.raises(RequestError, match="in use"):
                    await collect(client.submit([request("r2")]))
            await server.stop()

    asyncio.run(main())


def test_abort_reaches_the_engine_and_so_does_a_lost_gateway():
    async def main():
        with LoopThread().running() as loop:
            loop.paused.set()
            server = await serve_sessions(unix_address(), INFO, loop.inbox, loop.outbox)
            client = await connect(server.address)
            stream = client.submit([request("a"), request("b")])
            other = client.submit([request("c")])
            await eventually(lambda: loop.num_live == 3)
            stream.close()
            await eventually(lambda: loop.num_live == 1)
            assert await collect(stream) == []
            await client.close()
            await eventually(lambda: loop.num_live == 0)
            with pytest.raises(Unavailable):
                await collect(other)
            await server.stop()

    asyncio.run(main())


def test_an_aborted_id_that_is_used_again_gets_nothing_of_its_past():
    """The loop posts the end of the first `a` before it knows of the abort."""

    async def main():
        inbox, outbox = Inbox(), Outbox()
        server = await serve_sessions(unix_address(), INFO, inbox, outbox)
        async with grpc.aio.insecure_channel(server.address) as channel:
            call = engine_pb2_grpc.EngineStub(channel).Session()
            await call.read()
            deliver = outbox._wake
            outbox.attach(lambda: None)  # what is posted is delivered when the test says so
            await call.write(engine_pb2.SessionRequest(submit=request_to_proto(request("a"))))
            await eventually(lambda: len(inbox._commands) == 1)
            (first,) = inbox.drain()
            outbox.post([SequenceUpdate(first.request.id, (7,), FinishReason.STOP)], EngineStats())
            outbox.reject(first.request.id, RequestError("late"))
            await call.write(engine_pb2.SessionRequest(abort="a"))
            await call.write(engine_pb2.SessionRequest(submit=request_to_proto(request("a"))))
            await eventually(lambda: len(inbox._commands) == 2)
            abort, second = inbox.drain()
            assert abort == Abort(first.request.id)
            deliver()
            outbox.post([SequenceUpdate(second.request.id, (8,))], EngineStats())
            end = SequenceUpdate(second.request.id, (9,), FinishReason.LENGTH)
            outbox.post([end], EngineStats())
            deliver()
            updates = []
            while not updates or not updates[-1].finish:
                message = await asyncio.wait_for(call.read(), 5)
                assert not message.rejections
                updates += map(update_from_proto, message.updates)
            assert merged(updates) == SequenceUpdate("a", (8, 9), FinishReason.LENGTH)
            call.cancel()
        await server.stop()

    asyncio.run(main())


def test_unsent_updates_of_an_aborted_sequence_are_dropped():
    session = _Session()
    session.post("a", SequenceUpdate("a#0", (1,), FinishReason.STOP))
    session.post("b", SequenceUpdate("b#1", (2,)))
    session.rejections.append(("a", RequestError("late")))
    session.drop("a")
    response = session.take(EngineStats())
    assert [update.request_id for update in response.updates] == ["b"]
    assert not response.rejections


def test_engine_death_is_told_at_once_and_a_new_engine_is_found():
    async def main():
        with LoopThread().running() as loop:
            loop.paused.set()
            server = await serve_sessions(unix_address(), INFO, loop.inbox, loop.outbox)
            address = server.address
            async with closing(await connect(address)) as client:
                stream = client.submit([request("a")])
                await eventually(lambda: loop.num_live == 1)
                started = time.monotonic()
                await server.stop()
                with pytest.raises(Unavailable, match="send it again"):
                    await asyncio.wait_for(collect(stream), 5)
                assert time.monotonic() - started < 1
                assert not client.ready
                with pytest.raises(Unavailable):
                    client.submit([request("b")])
                assert client.info == INFO  # prompts can still be checked

                with LoopThread().running() as second:
                    server = await serve_sessions(address, INFO, second.inbox, second.outbox)
                    await asyncio.wait_for(client.wait_ready(), 5)
                    whole = merged(await collect(client.submit([request("c")])))
                    assert whole.finish is FinishReason.LENGTH
                    await server.stop()

    asyncio.run(main())


def test_client_follows_an_engine_that_moves_and_is_not_held_by_a_stranger(monkeypatch):
    monkeypatch.setattr(grpc_engine_client, "_HELLO_TIMEOUT_S", 0.1)

    async def main():
        client = GrpcEngineClient(None, reconnect_s=0.02, token=TOKEN)
        client.start()
        async with closing(client):
            with socket.create_server(("127.0.0.1", 0)) as stranger:
                client.connect_to(f"127.0.0.1:{stranger.getsockname()[1]}")
                await asyncio.sleep(0.05)  # it waits for the stranger's hello
                assert not client.ready
                for tokens in (3, 4):
                    with LoopThread().running() as loop:
                        server = await serve_sessions(unix_address(), INFO, loop.inbox, loop.outbox)
                        client.connect_to(server.address)
                        await asyncio.wait_for(client.wait_ready(), 5)
                        whole = merged(await collect(client.submit([request("a", tokens)])))
                        assert len(whole.tokens) == tokens
                        await server.stop()
                        await eventually(lambda: not client.ready)

    asyncio.run(main())


def test_stalled_engine_cannot_fill_the_gateways_memory():
    async def main():
        with LoopThread().running() as loop:
            loop.paused.set()
            server = await serve_sessions(unix_address(), INFO, Inbox(), loop.outbox)
            async with closing(await connect(server.address)) as client:
                room = INFO.num_slots + INFO.max_queue + 64
                client.submit([request(f"r{i}") for i in range(room)])
                with pytest.raises(Overloaded, match="in flight"):
                    client.submit([request("one-too-many")])
            await server.stop()

    asyncio.run(main())


def test_gateway_that_reads_slowly_gets_merged_updates_and_slows_nobody():
    async def main():
        inbox, outbox = Inbox(), Outbox()
        server = await serve_sessions(unix_address(), INFO, inbox, outbox)
        async with grpc.aio.insecure_channel(
            server.address, [("grpc.http2.lookahead_bytes", 0)]
        ) as channel:
            call = engine_pb2_grpc.EngineStub(channel).Session()
            await call.read()
            for name in ("slow",):
                submit = engine_pb2.SessionRequest(submit=request_to_proto(request(name)))
                await call.write(submit)
            async with closing(await connect(server.address)) as client:
                stream = client.submit([request("quick")])
                await eventually(lambda: len(inbox._commands) == 2)
                slow, quick = (command.request.id for command in inbox.drain())
                num_steps = 3000
                for step in range(num_steps):
                    updates = [SequenceUpdate(slow, tuple(range(400)))]
                    if step == num_steps - 1:
                        updates.append(SequenceUpdate(quick, (1,), FinishReason.STOP))
                    outbox.post(updates, EngineStats(num_steps=step + 1))
                    if step % 100 == 0:
                        await asyncio.sleep(0.005)
                # The other gateway is answered although the slow one has read nothing.
                assert merged(await asyncio.wait_for(collect(stream), 5)).tokens == (1,)
            num_messages = num_tokens = 0
            while num_tokens < num_steps * 400:
                message = await asyncio.wait_for(call.read(), 5)
                num_messages += 1
                num_tokens += sum(len(update.tokens) for update in message.updates)
            assert num_tokens == num_steps * 400
            assert num_messages < num_steps / 2
            call.cancel()
        await server.stop()

    asyncio.run(main())


def test_inbox_wakes_a_sleeping_loop_and_keeps_order():
    inbox = Inbox()
    assert inbox.drain() == []
    assert not inbox.wait(0.0)
    commands = [Submit(request("a")), Abort("a"), Submit(request("b"))]
    thread = threading.Thread(target=lambda: inbox.put(*commands))
    thread.start()
    assert inbox.wait(5)
    thread.join()
    assert inbox.drain() == commands
    assert inbox.drain() == []


def test_outbox_without_a_carrier_keeps_only_the_stats():
    outbox = Outbox()
    outbox.post([SequenceUpdate("a", (1,))], EngineStats(num_steps=4))
    outbox.reject("a", RequestError("x"))
    events = outbox.take()
    assert (events.updates, events.rejections) == ([], [])
    assert events.stats == EngineStats(num_steps=4)
