"""A KV cache that keeps what sequences computed, so that tests can give hits to the scheduler."""

import itertools
import random
from collections import Counter
from dataclasses import dataclass, replace

from jserve.cache.kv_cache import KVCache
from jserve.cache.layout import single_group
from jserve.cache.page_pool import PagePool
from jserve.cache.pages import NO_HIT, Hit, PageDelta, Pages
from jserve.cache.prefix import PageChain
from jserve.core.step import Move, MoveKind, NewPages


@dataclass(frozen=True, slots=True)
class CopyHit(Hit):
    """A hit that goes on inside of a page, of which the sequence gets a copy to write on."""

    source: int = 0


class SharingCache(KVCache):
    """Keeps pages by the tokens up to their end; finds full pages, and the start of one more.

    It forgets the longest starts first, so a page never outlives those before it.
    """

    def __init__(self, page_size: int, num_pages: int, seed: int, keep: float = 0.9) -> None:
        """`keep` is the share of releases whose content is worth keeping."""
        super().__init__(single_group(page_size), num_pages)
        self._pool = PagePool(num_pages, evict=self._forget)
        self._size = page_size
        self._keep = keep
        self._random = random.Random(seed)
        self._pages_of: dict[tuple[int, ...], int] = {}
        self._tokens_of: dict[int, tuple[int, ...]] = {}
        self.seen = Counter[str]()

    def match(self, chain: PageChain) -> Hit:
        tokens = chain.tokens()
        ids: list[int] = []
        while (end := (len(ids) + 1) * self._size) < len(tokens):
            page = self._pages_of.get(tokens[:end])
            if page is None:
                break
            ids.append(page)
        evictable = sum(map(self._pool.is_cached, ids))
        whole = Hit(len(ids) * self._size, (tuple(ids),), len(ids), evictable) if ids else NO_HIT
        return self._longer(whole, tokens)

    def _longer(self, hit: Hit, tokens: tuple[int, ...]) -> Hit:
        """`hit` and the tokens of one more page that begins alike, if there is one."""
        if self.pages_for(len(tokens)) >= self.num_free:
            return hit  # a copy must not make the hit cost more than none
        start, best, source = hit.num_tokens, 0, 0
        for kept, page in self._pages_of.items():
            if kept[:start] == tokens[:start] and start < len(kept) <= start + self._size:
                pairs = zip(kept[start:], tokens[start:-1], strict=False)
                same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
                if best < same < self._size:
                    best, source = same, page
        if not best:
            return hit
        evictable = hit.num_evictable + self._pool.is_cached(source)
        return CopyHit(start + best, hit.tables or ((),), hit.num_pages, evictable, source=source)

    def adopt(self, hit: Hit, chain: PageChain, num_context: int) -> tuple[Pages, PageDelta]:
        self.seen["hit"] += hit.num_tokens > 0
        self.seen["shared"] += any(self._pool.num_refs(page) for page in sum(hit.tables, ()))
        if not isinstance(hit, CopyHit):
            return super().adopt(hit, chain, num_context)
        self._pool.share([hit.source])  # until the copy is planned
        pages, _ = super().adopt(replace(hit, num_pages=1), chain, num_context)
        [own] = self._pool.take(1)
        self._pool.release([hit.source], keep=True)
        self._moves.append(Move(MoveKind.COPY, 0, hit.source, own))
        self.seen["copied"] += 1
        [table] = pages.tables
        table.append(own)
        self._measure(pages)
        return pages, (NewPages(0, 0, tuple(table)),)

    def release(self, pages: Pages, num_tokens: int) -> None:
        tokens = pages.chain.tokens(0, num_tokens)
        [table] = pages.tables
        if self._random.random() < self._keep:
            for index, page in enumerate(table[: self.pages_for(len(tokens))]):
                start = tokens[: (index + 1) * self._size]
                if start not in self._pages_of and page not in self._tokens_of:
                    self._pages_of[start] = page
                    self._tokens_of[page] = start
        for page in table:
            self._pool.release([page], keep=page in self._tokens_of)
        table.clear()
        pages.capacity = 0

    def _forget(self, count: int) -> list[int]:
        cached = [page for page in self._tokens_of if self._pool.is_cached(page)]
        cached.sort(key=lambda page: -len(self._tokens_of[page]))
        for page in cached[:count]:
            del self._pages_of[self._tokens_of.pop(page)]
        self.seen["evicted"] += count
        return cached[:count]
