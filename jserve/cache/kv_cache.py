"""The KV memory of one engine as the scheduler sees it: it asks in tokens and carries deltas."""

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass

from jserve.cache.layout import KVLayout
from jserve.cache.page_pool import PagePool
from jserve.core.errors import EngineError
from jserve.core.request import Request
from jserve.core.step import Move, NewPages

# Pages that were added to a sequence's page tables; the scheduler carries it into a chunk.
PageDelta = tuple[NewPages, ...]


class Pages:
    """The pages of one sequence in every group. Only `KVCache` looks inside.

    Attributes:
        capacity: tokens that they hold. All that the scheduler reads, and it does for every row.
    """

    __slots__ = ("capacity", "tables")

    def __init__(self, num_groups: int) -> None:
        self.capacity = 0
        self.tables: list[list[int]] = [[] for _ in range(num_groups)]  # page ids in order

    @property
    def num_pages(self) -> int:
        """Pages in all groups."""
        return sum(map(len, self.tables))


NO_PAGES = Pages(0)  # for sequences that never had a slot


@dataclass(frozen=True, slots=True)
class Hit:
    """Computed tokens at the start of a sequence whose K and V are in pages already.

    Attributes:
        num_tokens: less than the sequence has: the last one must still be computed.
        tables: page ids by group, known to `KVCache` alone.
        num_pages: pages in all groups.
        num_evictable: pages among them that nobody uses; they count as free until they are adopted.
    """

    num_tokens: int = 0
    tables: tuple[tuple[int, ...], ...] = ()
    num_pages: int = 0
    num_evictable: int = 0

    @property
    def num_entries(self) -> int:
        """Entries of the device's page table that the hit fills, in the group with most of them."""
        return max(map(len, self.tables), default=0)


NO_HIT = Hit()


class KVCache:
    """Owns every page of an engine. One owner, the scheduler; one thread.

    A released page may still be written by steps in flight: programs run in the order of their
    submission, so the next holder of the page writes it later.
    """

    def __init__(self, layout: KVLayout, num_pages: int) -> None:
        self.layout = layout
        self._page_sizes = tuple(group.page_size for group in layout.groups)
        self._pool = PagePool(num_pages)
        self._moves: list[Move] = []

    @property
    def num_pages(self) -> int:
        """Pages in all."""
        return self._pool.num_pages

    @property
    def num_free(self) -> int:
        """Pages that can be taken now, evictable ones included."""
        return self._pool.num_free

    # Pages needed by tokens.

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` tokens of one sequence, in all groups."""
        return sum(-(-num_tokens // size) for size in self._page_sizes)

    def missing(self, pages: Pages, num_tokens: int) -> int:
        """Pages that `pages` lacks to hold `num_tokens` tokens."""
        sizes = zip(pages.tables, self._page_sizes, strict=True)
        return sum(max(0, -(-num_tokens // size) - len(table)) for table, size in sizes)

    def cost(self, hit: Hit, num_tokens: int) -> int:
        """Free pages that a sequence with `hit` uses up to hold `num_tokens` tokens.

        They are the missing pages, and the evictable ones of the hit itself: these can be taken by
        nobody else from then on.
        """
        return self.pages_for(num_tokens) - hit.num_pages + hit.num_evictable

    def max_entries(self, num_tokens: int) -> int:
        """Entries of a page table that `num_tokens` tokens fill, in the group with most of them."""
        return max(-(-num_tokens // size) for size in self._page_sizes)

    # Room for tokens.

    def room(self, pages: Pages) -> int:
        """Tokens that `pages` could hold if it took every free page."""
        free = self._pool.num_free
        sizes = zip(pages.tables, self._page_sizes, strict=True)
        most = min((len(table) + free) * size for table, size in sizes)
        if len(pages.tables) == 1:
            return most
        counts = range(most + 1)
        return bisect_right(counts, free, key=lambda count: self.missing(pages, count)) - 1

    def can_all_grow(self, num_sequences: int, num_tokens: int) -> bool:
        """Whether any `num_sequences` sequences can hold `num_tokens` more tokens each; O(1).

        A yes is never wrong; after a no, `can_grow` says whether known sequences can.
        """
        return num_sequences * self.pages_for(num_tokens) <= self._pool.num_free

    def can_grow(self, wanted: Iterable[tuple[Pages, int]]) -> bool:
        """Whether free pages suffice for all of `wanted`: pages, and the tokens they must hold."""
        return self._missing(wanted) <= self._pool.num_free

    def admission_room(
        self,
        owed: Iterable[tuple[Pages, int]],
        *,
        num_running: int,
        headroom_pages: int,
        max_tokens: int,
    ) -> "AdmissionRoom":
        """The room for newcomers that running sequences leave.

        `owed` are pages of running sequences, and tokens that these will hold in any case. Beyond
        them, `headroom_pages` stay free for each of `num_running` sequences and each newcomer. No
        sequence holds more than `max_tokens` tokens.
        """
        free = self._pool.num_free - self._missing(owed) - headroom_pages * num_running
        return AdmissionRoom(self, free, headroom_pages, max_tokens)

    # Pages held by sequences.

    def match(self, request: Request, tokens: tuple[int, ...]) -> Hit:
        """The longest start of `tokens` that is in memory already. Nothing is taken.

        `tokens` are the prompt of `request` and its output so far. The hit is good until pages are
        taken or released, and never costs more than no hit. Nothing is kept yet, so nothing is
        found.
        """
        return NO_HIT

    def adopt(self, hit: Hit) -> tuple[Pages, PageDelta]:
        """Pages of a new sequence that starts with `hit`, and what the device must know of them."""
        pages = Pages(len(self._page_sizes))
        if not hit.num_pages:
            return pages, ()
        for table, ids in zip(pages.tables, hit.tables, strict=True):
            self._pool.share(ids)
            table += ids
        self._measure(pages)
        return pages, tuple(NewPages(group, 0, ids) for group, ids in enumerate(hit.tables) if ids)

    def grow(self, pages: Pages, num_tokens: int) -> PageDelta | None:
        """Makes `pages` hold `num_tokens` tokens; None, and nothing is taken, if too few are free.

        Cached pages are evicted where no others are free. The delta is empty if nothing lacked.
        """
        if num_tokens <= pages.capacity:
            return ()
        if len(pages.tables) > 1:
            return self._grow_groups(pages, num_tokens)
        # One group is the common case, and this runs for every row that lacks a page.
        [table], size = pages.tables, self._page_sizes[0]
        first = len(table)
        count = -(-num_tokens // size) - first
        if count > self._pool.num_free:
            return None
        ids = self._pool.take(count)
        table += ids
        pages.capacity = len(table) * size
        return (NewPages._make((0, first, tuple(ids))),)  # in half the time of naming the fields

    def _grow_groups(self, pages: Pages, num_tokens: int) -> PageDelta | None:
        """`grow` of more than one group: all of them, or none."""
        if self.missing(pages, num_tokens) > self._pool.num_free:
            return None
        delta: list[NewPages] = []
        for group, (table, size) in enumerate(zip(pages.tables, self._page_sizes, strict=True)):
            first = len(table)
            count = -(-num_tokens // size) - first
            if count > 0:
                ids = self._pool.take(count)
                table += ids
                delta.append(NewPages(group, first, tuple(ids)))
        self._measure(pages)
        return tuple(delta)

    def release(self, pages: Pages, tokens: tuple[int, ...]) -> None:
        """Takes `pages` back, which must not be used again; `tokens` are what they hold.

        Tokens that are not known yet, since their step is in flight, are not among `tokens`.
        """
        for table in pages.tables:
            self._pool.release(table)
            table.clear()
        pages.capacity = 0

    def take_moves(self) -> tuple[Move, ...]:
        """Hands out, once, the page copies that the next step must run before its program."""
        if not self._moves:
            return ()
        moves, self._moves = tuple(self._moves), []
        return moves

    def landed(self, host_pages: tuple[int, ...]) -> None:
        """Notes that OUT moves have filled `host_pages`: they may be copied IN or written again.

        Nothing is moved out yet.

        Raises:
            EngineError: a host page is not on its way.
        """
        raise EngineError(f"host pages {host_pages} have landed, but none was on its way")

    def audit(self, held: Iterable[Pages]) -> list[str]:
        """Lists what is wrong with pages if `held` are all that sequences hold; for tests."""
        problems = self._pool.audit()
        holders = [0] * (self.num_pages + 1)
        for pages in held:
            ids = [page for table in pages.tables for page in table]
            if len(set(ids)) < len(ids):
                problems.append(f"a sequence holds a page twice: {pages.tables}")
            for page in ids:
                holders[page] += 1
        for page in range(1, self.num_pages + 1):
            refs = self._pool.num_refs(page)
            if holders[page] != refs:
                problems.append(f"page {page} has {refs} references, {holders[page]} holders")
        return problems

    def _missing(self, wanted: Iterable[tuple[Pages, int]]) -> int:
        """Pages that all of `wanted` lack; most lack none."""
        return sum(
            self.missing(pages, num_tokens)
            for pages, num_tokens in wanted
            if num_tokens > pages.capacity
        )

    def _measure(self, pages: Pages) -> None:
        sizes = zip(pages.tables, self._page_sizes, strict=True)
        pages.capacity = min(len(table) * size for table, size in sizes)


class AdmissionRoom:
    """The room for newcomers in one step; it counts, and takes nothing from the cache."""

    def __init__(
        self, cache: KVCache, free_pages: int, headroom_pages: int, max_tokens: int
    ) -> None:
        self._cache = cache
        self._free_pages = free_pages
        self._headroom_pages = headroom_pages
        self._max_tokens = max_tokens
        self._num_entries = 0  # of the device's page tables, by the hits of those admitted

    def fits(self, hit: Hit, num_tokens: int) -> bool:
        """Whether a sequence with `hit` can be admitted and hold `num_tokens` tokens.

        A step tells the device the pages of one whole sequence, beside those of its chunks, so a
        second hit must fit into what the first ones leave of it.
        """
        if self._cache.cost(hit, num_tokens) > self._free_pages:
            return False
        num_entries = self._num_entries + hit.num_entries
        return not self._num_entries or num_entries <= self._cache.max_entries(self._max_tokens)

    def take(self, hit: Hit, num_tokens: int) -> None:
        """Subtracts a sequence that is admitted, and its headroom."""
        self._free_pages -= self._cache.cost(hit, num_tokens) + self._headroom_pages
        self._num_entries += hit.num_entries


def joined(first: PageDelta, then: PageDelta) -> PageDelta:
    """One delta for two that follow each other."""
    if not first or not then:
        return first or then
    ids = {new.group: new for new in first}
    for new in then:
        before = ids.get(new.group)
        ids[new.group] = new if before is None else before._replace(ids=before.ids + new.ids)
    return tuple(ids.values())
