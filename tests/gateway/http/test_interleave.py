"""Merging streams loses nothing, keeps each one's order and always closes all of them."""

import asyncio
from contextlib import aclosing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jserve.core.errors import EngineError, Unavailable
from jserve.gateway.http.interleave import interleaved


class Numbers:
    """Counts to `count`, giving way now and then; fails at the end if told so."""

    def __init__(self, count: int, *, stride: int = 1, fails: bool = False) -> None:
        self.count, self.stride, self.fails = count, stride, fails
        self.given = 0
        self.closed = False

    @property
    def finished(self) -> bool:
        return self.given == self.count and not self.fails

    def __aiter__(self) -> "Numbers":
        return self

    async def __anext__(self) -> int:
        if self.given % self.stride == 0:
            await asyncio.sleep(0)
        if self.given == self.count:
            if self.fails:
                raise EngineError("end")
            raise StopAsyncIteration
        self.given += 1
        return self.given

    def close(self) -> None:
        self.closed = True


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(1, 4)), min_size=1, max_size=5))
def test_all_items_in_each_ones_order(counts: list[tuple[int, int]]) -> None:
    sources = [Numbers(count, stride=stride) for count, stride in counts]

    async def main() -> list[tuple[int, int]]:
        return [item async for item in interleaved(sources)]

    items = asyncio.run(main())
    for index, (count, _) in enumerate(counts):
        assert [item for i, item in items if i == index] == list(range(1, count + 1))
    assert all(source.closed for source in sources)


@pytest.mark.parametrize("others", [0, 1, 3])
def test_an_error_ends_all(others: int) -> None:
    sources = [Numbers(2, fails=True), *(Numbers(10**9) for _ in range(others))]

    async def main() -> None:
        with pytest.raises(EngineError):
            async for _ in interleaved(sources):
                pass
        assert await _only_task()

    asyncio.run(main())
    assert all(source.closed for source in sources)


def test_a_source_that_somebody_closed_is_an_error() -> None:
    class CutOff(Numbers):
        finished = False  # pyright: ignore

    sources = [Numbers(2), CutOff(2)]

    async def main() -> None:
        with pytest.raises(Unavailable, match="stopped this request"):
            _ = [item async for item in interleaved(sources)]

    asyncio.run(main())
    assert [source.given for source in sources] == [2, 2]
    assert all(source.closed for source in sources)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_leaving_early_closes_all_and_nothing_runs_ahead(count: int) -> None:
    sources = [Numbers(10**9) for _ in range(count)]

    async def main() -> None:
        async with aclosing(interleaved(sources)) as items:
            async for _ in items:
                break
        assert await _only_task()

    asyncio.run(main())
    assert all(source.closed for source in sources)
    assert sum(source.given for source in sources) <= 2 * count + 1


async def _only_task() -> bool:
    for _ in range(5):
        await asyncio.sleep(0)
    return asyncio.all_tasks() == {asyncio.current_task()}
