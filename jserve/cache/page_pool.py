"""The free list and reference counts of KV pages: which ids are in use, not what they hold."""

from collections import deque
from collections.abc import Iterable


class PagePool:
    """Page ids 1..num_pages, first in, first out; id 0 is the null page and never handed out.

    A taken page has one reference and one writer. `share` adds a reader: only a full page, which
    nobody writes any more, may be shared. A page is free again when its last reference is
    released. Every operation is O(1) per page and deterministic. One owner, one thread.
    """

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages is {num_pages}; a pool needs at least 1")
        self._free = deque(range(1, num_pages + 1))
        self._num_refs = [0] * (num_pages + 1)

    @property
    def num_pages(self) -> int:
        """Pages in all, the null page not counted."""
        return len(self._num_refs) - 1

    @property
    def num_free(self) -> int:
        """Pages that `take` can hand out now."""
        return len(self._free)

    def num_refs(self, page: int) -> int:
        """Owners and readers of `page`; it may be written only while this is 1."""
        return self._num_refs[page]

    def take(self, count: int) -> list[int]:
        """`count` free pages, each with one reference.

        Raises:
            ValueError: fewer are free; nothing is taken.
        """
        free = self._free
        if count > len(free):
            raise ValueError(f"take: {count} pages asked for, {len(free)} free")
        pages = [free.popleft()] if count == 1 else [free.popleft() for _ in range(count)]
        for page in pages:
            self._num_refs[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """One more reference to each of `pages`.

        Raises:
            ValueError: a page is free or the null page.
        """
        for page in pages:
            if page < 1 or self._num_refs[page] == 0:
                raise ValueError(f"share: page {page} is not in use")
            self._num_refs[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Drops one reference to each of `pages`; those without any are free at once.

        Raises:
            ValueError: a page is free already or the null page.
        """
        for page in pages:
            if page < 1 or self._num_refs[page] == 0:
                raise ValueError(f"release: page {page} is not in use")
            self._num_refs[page] -= 1
            if self._num_refs[page] == 0:
                self._free.append(page)
