"""A gateway's side of an engine that hangs: no new work, then its clients are told."""

import asyncio

import pytest

from jserve.core.errors import Unavailable
from jserve.core.request import FinishReason, Request, SamplingParams
from jserve.core.stats import EngineStats
from jserve.engine.worker.session_server import serve_sessions
from jserve.gateway.engine_watch import EngineWatch
from jserve.gateway.grpc_engine_client import GrpcEngineClient
from tests.gateway.fixtures import INFO, LoopThread, closing, eventually, unix_address


def request(name: str) -> Request:
    return Request(id=name, prompt=(7, 8), sampling=SamplingParams(max_tokens=5))


@pytest.mark.parametrize("somebody_ends_it", [True, False])
def test_streams_are_told_and_new_work_waits_for_a_step(somebody_ends_it: bool) -> None:
    ended: list[bool] = []

    async def main() -> None:
        with LoopThread().running() as loop:
            loop.paused.set()  # its session goes on, and says so
            server = await serve_sessions(unix_address(), INFO, loop.inbox, loop.outbox)
            client = GrpcEngineClient(
                server.address,
                reconnect_s=0.01,
                resume_wait_s=60,
                watch=EngineWatch(suspect_s=0.1, hang_s=0.4),
                on_hang=(lambda: ended.append(True)) if somebody_ends_it else None,
            )
            async with closing(client):
                client.start()
                await asyncio.wait_for(client.wait_ready(), 5)
                stream = client.submit([request("a")])
                await eventually(lambda: not client.ready)
                assert client.seconds_since_step >= 0.1
                with pytest.raises(Unavailable) as refused:
                    client.submit([request("b")])
                assert refused.value.retry_after_s > 0
                with pytest.raises(Unavailable, match="send it again"):
                    await asyncio.wait_for(anext(stream), 5)
                assert ended == [True] * somebody_ends_it
                await eventually(lambda: loop.num_live == 0)  # it is told to drop the sequence
                assert not client.ready
                if somebody_ends_it:  # and it tells where the next one is
                    client.connect_to(server.address)
                    await asyncio.wait_for(client.wait_ready(), 5)
                else:  # a step shows that it lives
                    loop.outbox.post([], EngineStats(num_steps=1))
                    await eventually(lambda: client.ready)
                loop.paused.clear()
                updates = [update async for update in client.submit([request("c")])]
                assert updates[-1].finish is FinishReason.LENGTH
            await server.stop()

    asyncio.run(main())
