"""The states and reference counts of KV pages: which ids are in use, not what they hold."""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from itertools import islice

# Chooses `count` cached pages to give up, in the order in which they go, and forgets them. A prefix
# index gives leaves before the pages that they continue.
Evict = Callable[[int], Sequence[int]]


class PagePool:
    """The state of page ids 1..num_pages; id 0 is the null page and never handed out.

              take                release
        free ──────▶ used ─────────────────────▶ free      nobody holds it, its content is lost
                      ▲ │ release(keep=True)
                share │ ▼
                     cached ──── take, drop ───▶ free      nobody holds it, its content is kept

    A used page has one reference per holder and one writer. `share` adds a reader: only a full
    page, which nobody writes any more, may be shared. `take` hands out free pages in the order in
    which they became free, then evicts cached ones. Every operation is O(1) per page and
    deterministic. One owner, one thread.
    """

    def __init__(self, num_pages: int, evict: Evict | None = None) -> None:
        """`evict` must name cached pages only; without it the one cached longest ago goes first."""
        if num_pages < 1:
            raise ValueError(f"num_pages is {num_pages}; a pool needs at least 1")
        self._free = deque(range(1, num_pages + 1))
        self._cached: dict[int, None] = {}  # a set in the order in which pages were cached
        self._num_refs = [0] * (num_pages + 1)
        self._evict = evict or self._oldest

    @property
    def num_pages(self) -> int:
        """Pages in all, the null page not counted."""
        return len(self._num_refs) - 1

    @property
    def num_free(self) -> int:
        """Pages that `take` can hand out now, cached ones included."""
        return len(self._free) + len(self._cached)

    @property
    def num_cached(self) -> int:
        """Pages that nobody holds and whose content is kept."""
        return len(self._cached)

    def num_refs(self, page: int) -> int:
        """Owners and readers of `page`; it may be written only while this is 1."""
        return self._num_refs[page]

    def is_cached(self, page: int) -> bool:
        return page in self._cached

    def take(self, count: int) -> list[int]:
        """`count` pages, each with one reference, evicting cached ones if too few are free.

        Raises:
            ValueError: fewer are free and cached; nothing is taken.
        """
        free = self._free
        if count > len(free):
            self._make_free(count)
        pages = [free.popleft()] if count == 1 else [free.popleft() for _ in range(count)]
        for page in pages:
            self._num_refs[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Adds a reference to each of `pages`; a cached page is used again.

        Raises:
            ValueError: a page is free or the null page.
        """
        for page in pages:
            if page < 1 or (self._num_refs[page] == 0 and page not in self._cached):
                raise ValueError(f"share: page {page} is not in use")
            self._cached.pop(page, None)
            self._num_refs[page] += 1

    def release(self, pages: Iterable[int], *, keep: bool = False) -> None:
        """Drops one reference to each of `pages`; the last one frees it, or caches it if `keep`.

        Raises:
            ValueError: a page is not used, or is the null page.
        """
        for page in pages:
            if page < 1 or self._num_refs[page] == 0:
                raise ValueError(f"release: page {page} is not in use")
            self._num_refs[page] -= 1
            if self._num_refs[page] == 0:
                if keep:
                    self._cached[page] = None
                else:
                    self._free.append(page)

    def drop(self, pages: Iterable[int]) -> None:
        """Frees cached pages whose content is of no use any more.

        Raises:
            ValueError: a page is not cached.
        """
        for page in pages:
            if page not in self._cached:
                raise ValueError(f"drop: page {page} is not cached")
            del self._cached[page]
            self._free.append(page)

    def audit(self) -> list[str]:
        """Lists what is wrong with the states of pages, if anything is; for tests."""
        free, cached = list(self._free), set(self._cached)
        used = {page for page, refs in enumerate(self._num_refs) if refs > 0}
        found = sorted([*free, *cached, *used])
        if found != list(range(1, self.num_pages + 1)):
            return [f"pages are lost or in two states: free {free}, cached {cached}, used {used}"]
        return []

    def _make_free(self, count: int) -> None:
        if count > self.num_free:
            raise ValueError(f"take: {count} pages asked for, {self.num_free} free")
        missing = count - len(self._free)
        evicted = self._evict(missing)
        if len(evicted) != missing:
            raise ValueError(f"take: {len(evicted)} pages were evicted, not {missing}")
        self.drop(evicted)

    def _oldest(self, count: int) -> list[int]:
        return list(islice(self._cached, count))
