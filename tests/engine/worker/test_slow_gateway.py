"""Sessions without sockets: whose updates are whose, and for how long an id is taken."""

import asyncio
import contextlib

import pytest

from jserve.core.clock import ManualClock
from jserve.core.errors import RequestError
from jserve.core.request import FinishReason, Request, SamplingParams, SequenceUpdate
from jserve.core.stats import EngineStats
from jserve.engine.inbox import Abort, Inbox, Outbox
from jserve.engine.worker.session import EngineSessions
from jserve.proto import engine_pb2
from jserve.proto.convert import request_to_proto, update_from_proto
from tests.gateway.fixtures import INFO


def request(request_id: str) -> Request:
    return Request(id=request_id, prompt=(7, 8, 9), sampling=SamplingParams(max_tokens=5))


class SlowGateway:
    """One gateway's stream without a socket: the engine writes no further until it is read."""

    def __init__(self, sessions):
        self._requests = asyncio.Queue()
        self._messages = asyncio.Queue(maxsize=1)
        self._serving = asyncio.create_task(sessions.Session(self._sent(), self))

    async def _sent(self):
        while True:
            yield await self._requests.get()

    async def write(self, message):
        await self._messages.put(message)

    def submit(self, request_id):
        self._requests.put_nowait(
            engine_pb2.SessionRequest(submit=request_to_proto(request(request_id)))
        )

    def abort(self, request_id):
        self._requests.put_nowait(engine_pb2.SessionRequest(abort=request_id))

    async def read(self):
        """Everything written until the engine has nothing more to say: updates, refused ids."""
        updates, refused = [], []
        await pause()
        while not self._messages.empty():
            message = self._messages.get_nowait()
            updates += map(update_from_proto, message.updates)
            refused += [rejection.request_id for rejection in message.rejections]
            await pause()
        return updates, refused

    async def leave(self):
        self._serving.cancel()
        await asyncio.gather(self._serving, return_exceptions=True)


async def pause():
    """Lets every task that can run do so; there is no socket to wait for."""
    for _ in range(20):
        await asyncio.sleep(0)


class SlowSessions:
    """The engine's side with `SlowGateway`s, whose events are delivered when the test says so."""

    def __init__(self):
        self.inbox, self.outbox = Inbox(), Outbox()
        self.outbox.attach(lambda: None)
        self.sessions = EngineSessions(INFO, self.inbox, self.outbox)

    @contextlib.asynccontextmanager
    async def gateways(self, count=1):
        gateways = [SlowGateway(self.sessions) for _ in range(count)]
        await pause()  # each has a hello to read, and so a full stream
        self.deliver()
        await pause()  # and a message in hand: all that comes later is unsent
        yield gateways
        for gateway in gateways:
            await gateway.leave()

    def deliver(self, *updates):
        self.outbox.post(updates, EngineStats())
        self.sessions.deliver()

    async def commands(self):
        await pause()
        return self.inbox.drain()


@pytest.mark.parametrize("finish", [None, FinishReason.STOP])
def test_an_id_used_again_gets_nothing_that_was_unsent_at_its_abort(finish):
    async def main():
        engine = SlowSessions()
        async with engine.gateways() as (gateway,):
            gateway.submit("a")
            (first,) = await engine.commands()
            engine.deliver(SequenceUpdate(first.request.id, (7,), finish))
            gateway.abort("a")
            gateway.submit("a")
            *aborts, second = await engine.commands()
            assert aborts == ([] if finish else [Abort(first.request.id)])
            end = SequenceUpdate(second.request.id, (8,), FinishReason.LENGTH)
            engine.deliver(end)
            assert await gateway.read() == ([end._replace(request_id="a")], [])

    asyncio.run(main())


def test_a_gateway_cannot_abort_a_sequence_of_another():
    async def main():
        engine = SlowSessions()
        async with engine.gateways(2) as (owner, other):
            owner.submit("a")
            (submit,) = await engine.commands()
            other.abort("a")
            assert await engine.commands() == []
            end = SequenceUpdate(submit.request.id, (7,), FinishReason.STOP)
            engine.deliver(end)
            assert await owner.read() == ([end._replace(request_id="a")], [])
            assert await other.read() == ([], [])

    asyncio.run(main())


def test_an_id_is_in_use_until_its_end_is_sent():
    async def main():
        engine = SlowSessions()
        async with engine.gateways() as (gateway,):
            gateway.submit("a")
            (submit,) = await engine.commands()
            end = SequenceUpdate(submit.request.id, (7,), FinishReason.STOP)
            engine.deliver(end)
            gateway.submit("a")
            assert await engine.commands() == []
            assert await gateway.read() == ([end._replace(request_id="a")], ["a"])
            gateway.submit("a")
            assert len(await engine.commands()) == 1

    asyncio.run(main())


def test_a_rejected_sequence_is_forgotten():
    async def main():
        engine = SlowSessions()
        async with engine.gateways() as (gateway,):
            gateway.submit("a")
            (submit,) = await engine.commands()
            engine.outbox.reject(submit.request.id, RequestError("no such adapter"))
            engine.deliver()
            assert not engine.sessions._by_engine_id
            assert await gateway.read() == ([], ["a"])
            gateway.submit("a")
            assert len(await engine.commands()) == 1
            assert await gateway.read() == ([], [])

    asyncio.run(main())


def test_a_heartbeat_tells_how_far_the_loop_is_though_it_stands_still():
    async def main():
        engine, clock = SlowSessions(), ManualClock(50.0)
        compiling = False
        sessions = EngineSessions(
            INFO, engine.inbox, engine.outbox, clock=clock, is_compiling=lambda: compiling
        )
        engine.outbox.post([], EngineStats(num_steps=7, num_running=3))
        sessions.deliver()
        gateway = SlowGateway(sessions)
        await pause()
        assert gateway._messages.get_nowait().HasField("hello")
        clock.advance(4)
        sessions.beat()
        await pause()
        beat = gateway._messages.get_nowait().heartbeat
        assert beat == engine_pb2.Heartbeat(num_steps=7, unchanged_s=4, num_running=3)
        clock.advance(10)
        engine.outbox.post([], EngineStats(num_steps=7, num_running=2))  # the same step
        sessions.deliver()
        compiling = True
        sessions.beat()
        await pause()
        beat = gateway._messages.get_nowait().heartbeat
        assert beat == engine_pb2.Heartbeat(
            num_steps=7, unchanged_s=14, num_running=2, compiling=True
        )
        sessions.deliver()
        await pause()
        assert not gateway._messages.get_nowait().HasField("heartbeat")
        await gateway.leave()

    asyncio.run(main())
