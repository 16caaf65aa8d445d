"""Mixed traffic with random cancels over a real session: everything returns to the baseline."""

import asyncio
import gc
import random
from collections import Counter
from dataclasses import replace

from jserve.core.errors import Overloaded, Unavailable
from jserve.engine.worker.session_server import serve_sessions
from jserve.gateway.engine_client import UpdateStream
from jserve.gateway.grpc_engine_client import GrpcEngineClient
from jserve.gateway.request_plane import Prompt, RequestPlane
from jserve.gateway.validation import SamplingFields
from tests.gateway.fixtures import INFO, LoopThread, closing, eventually, make_plane, unix_address

ROOMY = replace(INFO, num_slots=16, max_queue=256)


async def one(plane: RequestPlane, rng: random.Random, outcomes: Counter[str]) -> None:
    """A generation that ends by itself, by a stop string, by a cancel, or by the engine."""
    text = rng.choice(["Hello, world! ", "你好 👍 ", "x" * 40])
    generation = plane.prepare(
        id="g",
        prompt=Prompt(tuple(plane.tokenizer.encode(text)), text),
        sampling=SamplingFields(max_tokens=rng.randint(1, 200)),
        stop=rng.choice([None, "wor", "👍"]),
        n=rng.choice([1, 1, 3]),
    )
    patience = rng.choice([None, 0, 1, 5])
    try:
        deltas = plane.run(generation)
        try:
            answers = Counter[int]()
            async for delta in deltas:
                answers[delta.index] += len(delta.token_ids)
                assert answers[delta.index] <= generation.sampling.max_tokens
                if patience is not None and sum(answers.values()) > patience:
                    outcomes["cancelled"] += 1
                    return
            outcomes["finished"] += 1
        finally:
            deltas.close()
    except Overloaded:
        outcomes["overloaded"] += 1
    except Unavailable as error:  # asks again
        outcomes["cut off"] += "the engine stopped" in str(error)
        await asyncio.sleep(0.01)
        await one(plane, rng, outcomes)


def test_nothing_is_left_behind():
    outcomes = Counter[str]()

    async def main():
        rng = random.Random(7)
        with LoopThread(ROOMY).running() as loop:
            server = await serve_sessions(unix_address(), ROOMY, loop.inbox, loop.outbox)
            client = GrpcEngineClient(server.address, reconnect_s=0.01)
            client.start()
            await client.wait_ready()
            async with closing(client):
                plane = make_plane(client)

                async def worker():
                    for _ in range(8):
                        await one(plane, rng, outcomes)

                workers = [asyncio.create_task(worker()) for _ in range(40)]
                await eventually(lambda: sum(outcomes.values()) > 50, 30)
                await server.stop()  # the engine goes away in the middle of it
                address = server.address
                server = await serve_sessions(address, ROOMY, loop.inbox, loop.outbox)
                await asyncio.gather(*workers)
                await eventually(lambda: loop.num_live == 0)
                await eventually(lambda: not client._streams)
                assert plane.num_live == 0
                await plane.drain(1)
            await server.stop()

    asyncio.run(main())
    assert outcomes["cut off"] > 0
    assert sum(outcomes.values()) - outcomes["cut off"] == 320
    assert outcomes["finished"] > 30
    assert outcomes["cancelled"] > 30
    gc.collect()
    assert not [thing for thing in gc.get_objects() if isinstance(thing, UpdateStream)]
