"""The KV memory of one engine as the scheduler sees it: it asks in tokens and carries deltas."""

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

from jserve.cache.layout import KVLayout
from jserve.cache.page_pool import PagePool
from jserve.cache.pages import NEVER, NO_HIT, PENDING, Hit, PageDelta, Pages
from jserve.cache.prefix import PageChain, PrefixIndex
from jserve.core.errors import EngineError
from jserve.core.pages import Digest, root_digest
from jserve.core.request import Request
from jserve.core.step import Move, NewPages


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixSharing:
    """The facts, beside salt and tokens, that name the pages of a cache; which ones are shared."""

    weights: str = ""  # digest
    kv_dtype: str = ""
    generated: bool = True  # share what decode steps have written, too
    compare_tokens: bool = False  # an error where two contents have one name; for debugging


class KVCache:
    """Owns every page of an engine. One owner, the scheduler; one thread.

    A released page may still be written by steps in flight: programs run in the order of their
    submission, so the next holder of the page writes it later. For the same reason the full pages
    of a prompt may be shared as soon as the step that computes them is planned.
    """

    def __init__(
        self, layout: KVLayout, num_pages: int, sharing: PrefixSharing | None = None
    ) -> None:
        """Without `sharing`, nothing that was computed is kept.

        Raises:
            ValueError: pages of more than one group are to be shared.
        """
        self.layout = layout
        self._page_sizes = tuple(group.page_size for group in layout.groups)
        self._moves: list[Move] = []
        self._sharing = sharing
        self._index: PrefixIndex | None = None
        if sharing is not None:
            if len(layout.groups) > 1:
                raise ValueError(f"prefixes of {len(layout.groups)} page groups cannot be shared")
            self._index = PrefixIndex(compare_tokens=sharing.compare_tokens)
        self._pool = PagePool(num_pages, None if self._index is None else self._index.evict)
        # By name: the sequence that is about to compute the page.
        self._pending: dict[Digest, Pages] = {}

    @property
    def num_pages(self) -> int:
        """Pages in all."""
        return self._pool.num_pages

    @property
    def num_free(self) -> int:
        """Pages that can be taken now, evictable ones included."""
        return self._pool.num_free

    @property
    def num_cached(self) -> int:
        """Pages among the free ones whose content is kept."""
        return self._pool.num_cached

    @property
    def num_evicted(self) -> int:
        """Pages whose content was kept and then given up."""
        return 0 if self._index is None else self._index.num_evicted

    @property
    def shares_prefixes(self) -> bool:
        """Whether `match` can find anything."""
        return self._index is not None

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

    def chain(self, request: Request, output: list[int]) -> PageChain:
        """The chain of a sequence, for its whole life; `output` is its list of output tokens."""
        root = b""
        if (sharing := self._sharing) is not None:
            root = root_digest(
                weights=sharing.weights,
                kv_dtype=sharing.kv_dtype,
                page_size=self._page_sizes[0],
                salt=request.cache_salt,
            )
        return PageChain(root, request.prompt, output, self._page_sizes[0])

    def match(self, chain: PageChain) -> Hit:
        """The longest start of a sequence's tokens that is in memory already. Nothing is taken.

        The hit is good until pages are taken or released, and never costs more than no hit. It has
        full pages only, and leaves the last token, from whose computation the next one comes.
        """
        if self._index is None:
            return NO_HIT
        most = (chain.num_tokens - 1) // chain.page_size
        ids = self._index.match(chain, most)
        pending = len(ids) < most and chain.digests(most)[len(ids)] in self._pending
        if not ids:
            return PENDING if pending else NO_HIT
        evictable = sum(map(self._pool.is_cached, ids))
        return Hit(len(ids) * chain.page_size, (tuple(ids),), len(ids), evictable, pending)

    def adopt(self, hit: Hit, chain: PageChain, num_context: int) -> tuple[Pages, PageDelta]:
        """Pages of a new sequence that starts with `hit`, and what the device must know of them.

        Prompt chunks will compute the first `num_context` tokens, and others may wait for those.
        """
        pages = Pages(len(self._page_sizes), chain, num_context)
        if self._sharing is not None:
            pages.most_kept = NEVER if self._sharing.generated else num_context
        if hit.num_pages:
            self._share(hit, pages)
        if self._index is not None:
            pages.num_kept = hit.num_pages
            full = num_context // chain.page_size
            for digest in islice(chain.digests(full), hit.num_pages, full):
                self._pending.setdefault(digest, pages)
        return pages, tuple(NewPages(group, 0, ids) for group, ids in enumerate(hit.tables) if ids)

    def _share(self, hit: Hit, pages: Pages) -> None:
        for table, ids in zip(pages.tables, hit.tables, strict=True):
            self._pool.share(ids)
            if self._index is not None:
                self._index.use(ids)
            table += ids
        self._measure(pages)

    def keep(self, pages: Pages, num_tokens: int) -> int:
        """Lets others share the full pages among the first `num_tokens` tokens of `pages`.

        These tokens are known, and computed once the steps planned so far have run. Returns the
        number of tokens at which there will be more to share. Runs for every page of every answer.
        """
        index = self._index
        if index is None:
            return NEVER
        size, first = self._page_sizes[0], pages.num_kept
        full = min(num_tokens, pages.most_kept) // size
        if full > first:
            [table], chain = pages.tables, pages.chain
            num_context = pages.num_context
            digests = chain.digests(full)
            for at in range(first, full):
                end = (at + 1) * size
                if end <= num_context:
                    self._forget_pending(digests[at], pages)
                index.insert(table[at], chain, at, generated=end > num_context)
            pages.num_kept = full
        else:
            full = first
        following = (full + 1) * size
        return following if following <= pages.most_kept else NEVER

    def _forget_pending(self, digest: Digest, pages: Pages) -> None:
        if self._pending.get(digest) is pages:
            del self._pending[digest]

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

    def release(self, pages: Pages, num_tokens: int) -> None:
        """Takes `pages` back, which must not be used again.

        The first `num_tokens` tokens of them are known, and computed once the steps planned so far
        have run.
        """
        if self._index is None:
            for table in pages.tables:
                self._pool.release(table)
        else:
            self._leave(self._index, pages, num_tokens)
        for table in pages.tables:
            table.clear()
        pages.capacity = 0

    def retire(self, pages: Pages, num_tokens: int, num_planned: int) -> None:
        """Releases `pages` of which steps in flight compute the last of `num_planned` tokens.

        Pages that are full then are kept if they can be; `settle` says what they hold.
        """
        self.keep(pages, num_tokens)
        if self._index is not None:
            [table] = pages.tables
            full = min(num_planned, pages.most_kept) // self._page_sizes[0]
            for index in range(pages.num_kept, full):
                before = table[index - 1] if index else None
                pages.expected.append((index, self._index.expect(table[index], before)))
        self.release(pages, num_tokens)

    def settle(self, pages: Pages, num_tokens: int) -> None:
        """Lets others share what `retire` has kept, of which `num_tokens` tokens are known now."""
        if self._index is None:
            return
        for index, node in pages.expected:
            known = (index + 1) * self._page_sizes[0] <= num_tokens
            named = known and self._index.arrived(node, pages.chain, index)
            if not named and self._index.is_kept(node):
                self._index.forget(node)
                self._pool.drop([node.page])
        pages.expected.clear()

    def _leave(self, index: PrefixIndex, pages: Pages, num_tokens: int) -> None:
        """Releases `pages`, and keeps those that can be found."""
        self.keep(pages, num_tokens)
        chain, full = pages.chain, pages.num_context // self._page_sizes[0]
        for digest in islice(chain.digests(full), pages.num_kept, full):
            self._forget_pending(digest, pages)
        [table] = pages.tables
        self._pool.release(page for page in table if not index.has(page))
        named = [page for page in reversed(table) if index.has(page)]
        self._pool.release(named, keep=True)
        index.leave(page for page in named if self._pool.is_cached(page))

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
        if self._index is not None:
            problems += self._index.audit(
                page for page in range(1, self.num_pages + 1) if self._pool.is_cached(page)
            )
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
