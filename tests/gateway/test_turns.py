"""Turns of tenants at few places, and at the event loop."""

import asyncio
from itertools import pairwise

import pytest

from jserve.gateway.turns import LoopTurns, TenantTurns


class Worker:
    """Takes places for jobs named `tenant` + number; notes the order in which they get one."""

    def __init__(self, num_places: int) -> None:
        self.turns = TenantTurns(num_places)
        self.begun: list[str] = []
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def start(self, *jobs: str) -> None:
        for job in jobs:
            self.tasks[job] = asyncio.create_task(self._take(job))
        await self.settle()

    async def _take(self, job: str) -> None:
        await self.turns.take(job[0])
        self.begun.append(job)

    async def end(self, job: str) -> None:
        self.turns.give_back(job[0])
        await self.settle()

    async def settle(self) -> None:
        for _ in range(3):
            await asyncio.sleep(0)


def test_a_tenant_with_much_takes_all_places_only_while_nobody_else_waits() -> None:
    async def main() -> None:
        worker = Worker(2)
        await worker.start("a1", "a2", "a3", "a4")
        assert worker.begun == ["a1", "a2"]
        await worker.start("b1", "b2", "c1")
        await worker.end("a1")
        assert worker.begun[2:] == ["b1"]  # a has a place still, and b has none
        for job in ("a2", "b1", "a3"):
            await worker.end(job)
        assert worker.begun[3:] == ["a3", "c1", "b2"]
        await worker.end("c1")
        assert worker.begun[6:] == ["a4"]
        await worker.start("a5")
        await worker.start("d1")
        await worker.end("b2")
        assert worker.begun[7:] == ["d1"]  # a waits for longer, but has a place
        await worker.end("d1")
        assert worker.begun[8:] == ["a5"]

    asyncio.run(main())


def test_tenants_take_turns_at_one_place() -> None:
    async def main() -> None:
        worker = Worker(1)
        await worker.start("a1", "a2", "a3", "b1", "b2", "c1")
        for _ in range(5):
            await worker.end(worker.begun[-1])
        assert worker.begun == ["a1", "a2", "b1", "c1", "a3", "b2"]

    asyncio.run(main())


def test_who_is_cancelled_takes_nobodys_place() -> None:
    async def main() -> None:
        worker = Worker(1)
        await worker.start("a1", "b1", "c1", "d1")
        worker.tasks["b1"].cancel()  # it waits
        await worker.settle()
        worker.turns.give_back("a")
        worker.tasks["c1"].cancel()  # it was given the place just now
        await worker.settle()
        assert worker.begun == ["a1", "d1"]
        await worker.end("d1")
        await worker.start("e1")
        assert worker.begun[-1] == "e1"
        assert not worker.turns._waiting
        assert worker.turns._held == {"e": 1}

    asyncio.run(main())


def test_requests_that_come_at_once_begin_in_turns_of_the_event_loop():
    async def main():
        turns, begun = LoopTurns(), []

        async def begin(name: str) -> None:
            await turns.take(name[0])
            begun.append(name)

        async with asyncio.TaskGroup() as group:
            for name in ("a1", "a2", "a3", "b1"):
                group.create_task(begin(name))
            counts = []
            while len(begun) < 4:
                counts.append(len(begun))
                await asyncio.sleep(0)
        assert begun == ["a1", "a2", "b1", "a3"]  # b1 passes a3, which came before it
        steps = {after - before for before, after in pairwise(counts)}
        assert steps == {0, 1}  # between two of them the loop comes round

    asyncio.run(main())


def test_a_request_alone_begins_at_once():
    async def main():
        turns = LoopTurns()
        for _ in range(3):
            taking = turns.take("a")
            with pytest.raises(StopIteration):
                taking.send(None)  # it waits for nothing
            await asyncio.sleep(0)

    asyncio.run(main())
