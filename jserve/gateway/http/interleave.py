"""Merges several streams into one."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import Protocol, TypeVar

from jserve.core.errors import Unavailable

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Source(Protocol[T_co]):
    """An asynchronous iterator that can be closed before its end."""

    @property
    def finished(self) -> bool:
        """Whether all items have come; False after a `close` by another owner."""
        ...

    def __aiter__(self) -> AsyncIterator[T_co]: ...

    def close(self) -> None:
        """Stops the source; idempotent, does not block."""
        ...


async def interleaved(sources: Sequence[Source[T]]) -> AsyncGenerator[tuple[int, T], None]:
    """Yields (index of the source, item) as items come; at most one item each is buffered.

    The first error of a source is raised. All sources are closed at the end, also when the
    generator itself is closed early.

    Raises:
        Unavailable: a source ended before it was finished.
    """
    merge = _one if len(sources) == 1 else _several
    try:
        async with aclosing(merge(sources)) as items:
            async for item in items:
                yield item
        if not all(source.finished for source in sources):
            raise Unavailable("the server stopped this request; try again", retry_after_s=1.0)
    finally:
        for source in sources:
            source.close()


async def _one(sources: Sequence[Source[T]]) -> AsyncGenerator[tuple[int, T], None]:
    async for item in sources[0]:
        yield 0, item


async def _several(sources: Sequence[Source[T]]) -> AsyncGenerator[tuple[int, T], None]:
    queue: asyncio.Queue[tuple[int, T] | Exception | None] = asyncio.Queue(len(sources))

    async def pump(index: int, source: Source[T]) -> None:
        try:
            async for item in source:
                await queue.put((index, item))
        except Exception as error:  # the top of a task: the reader raises it
            await queue.put(error)
        else:
            await queue.put(None)

    tasks = [asyncio.create_task(pump(*it)) for it in enumerate(sources)]
    try:
        left = len(tasks)
        while left:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
