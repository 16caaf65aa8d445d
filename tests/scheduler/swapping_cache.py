"""A KV cache that moves pages out to the host and in again, so that tests can land them."""

import random
from collections import Counter
from dataclasses import dataclass

from jserve.cache.kv_cache import KVCache
from jserve.cache.layout import single_group
from jserve.cache.pages import NO_HIT, Hit, PageDelta, Pages
from jserve.cache.prefix import PageChain
from jserve.core.step import Move, MoveKind


@dataclass(frozen=True, slots=True)
class HostHit(Hit):
    """Computed tokens in host pages, which the sequence gets copies of in pages of its own."""

    host_pages: tuple[int, ...] = ()

    @property
    def num_entries(self) -> int:
        return len(self.host_pages)


class SwappingCache(KVCache):
    """Copies the pages of a sequence that leaves its slot to the host, by the tokens in them.

    A host page is read, and written again, only after it has landed; the one that landed first is
    forgotten first. The pages on the device are free at once: their next holder writes them later.
    """

    def __init__(
        self, page_size: int, num_pages: int, num_host_pages: int, seed: int, keep: float = 0.9
    ) -> None:
        """`keep` is the share of releases whose content is worth keeping."""
        super().__init__(single_group(page_size), num_pages)
        self.num_host_pages = num_host_pages
        self._size = page_size
        self._keep = keep
        self._random = random.Random(seed)
        self._free_host = list(range(num_host_pages))
        self._host_of: dict[tuple[int, ...], int] = {}  # by all tokens up to the page's end
        self._leaving: dict[int, tuple[int, ...]] = {}
        self._on_host: dict[int, tuple[int, ...]] = {}  # in the order in which they landed
        self.seen = Counter[str]()

    def leaves(self, tokens: tuple[int, ...]) -> bool:
        """Whether a page of these first `tokens` of a sequence is on its way to the host."""
        return any(key == tokens[: len(key)] for key in self._leaving.values())

    def match(self, chain: PageChain) -> Hit:
        tokens = chain.tokens()
        found: list[int] = []
        num_tokens = 0
        while (full := self._landed_page(tokens, num_tokens + self._size)) is not None:
            found.append(full)
            num_tokens += self._size
        for end in range(num_tokens + self._size - 1, num_tokens, -1):
            if (part := self._landed_page(tokens, end)) is not None:
                found.append(part)
                num_tokens = end
                break
        return HostHit(num_tokens, host_pages=tuple(found)) if found else NO_HIT

    def _landed_page(self, tokens: tuple[int, ...], end: int) -> int | None:
        """The host page of the tokens that end at `end`, the last token of all not among them."""
        page = self._host_of.get(tokens[:end]) if end < len(tokens) else None
        if page in self._leaving:
            self.seen["not landed"] += 1
            return None
        return page

    def adopt(self, hit: Hit, chain: PageChain, num_context: int) -> tuple[Pages, PageDelta]:
        pages, delta = super().adopt(hit, chain, num_context)
        if not isinstance(hit, HostHit):
            return pages, delta
        delta = self.grow(pages, hit.num_tokens)
        assert delta is not None  # a hit costs as much as none
        pairs = zip(hit.host_pages, pages.tables[0], strict=True)
        self._moves += [Move(MoveKind.IN, 0, host, page) for host, page in pairs]
        self.seen["in"] += 1
        self.seen["inside"] += hit.num_tokens % self._size > 0
        return pages, delta

    def release(self, pages: Pages, num_tokens: int) -> None:
        tokens = pages.chain.tokens(0, num_tokens)
        if self._random.random() < self._keep:
            held = pages.tables[0][: self.pages_for(len(tokens))]
            for index, page in enumerate(held):
                self._move_out(page, tokens[: (index + 1) * self._size])
        super().release(pages, num_tokens)

    def _move_out(self, page: int, tokens: tuple[int, ...]) -> None:
        if tokens in self._host_of or not (self._free_host or self._on_host):
            return
        if not self._free_host:
            oldest = next(iter(self._on_host))
            del self._host_of[self._on_host.pop(oldest)]
            self._free_host.append(oldest)
            self.seen["forgotten"] += 1
        host = self._free_host.pop()
        self._host_of[tokens] = host
        self._leaving[host] = tokens
        self._moves.append(Move(MoveKind.OUT, 0, page, host))
        self.seen["out"] += 1

    def landed(self, host_pages: tuple[int, ...]) -> None:
        for page in host_pages:
            self._on_host[page] = self._leaving.pop(page)
