"""Full pages by the name of their content, so that prompts which begin alike share them.

vLLM's automatic prefix caching, and SGLang's RadixAttention: a name stands for all tokens up to the
end of its page, so a map from names to pages is the radix tree at the granularity of pages.
"""

import heapq
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from jserve.core.errors import EngineError
from jserve.core.pages import Digest, page_digests

_MAX_EVENTS = 1 << 16  # that are kept for a reader


class PageChain:
    """The tokens of one sequence, and the names of its full pages; both only grow.

    `output` is the sequence's own list: what is appended to it belongs to the chain.
    """

    __slots__ = ("_digests", "_output", "_prompt", "page_size", "root")

    def __init__(
        self, root: Digest, prompt: tuple[int, ...], output: list[int], page_size: int
    ) -> None:
        self.root = root
        self._prompt = prompt
        self._output = output
        self.page_size = page_size
        self._digests: list[Digest] = []

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt and the output so far."""
        return len(self._prompt) + len(self._output)

    def tokens(self, start: int = 0, end: int | None = None) -> tuple[int, ...]:
        """The tokens at positions [start, end)."""
        split = len(self._prompt)
        end = self.num_tokens if end is None else end
        head = self._prompt[start:end]
        return (
            head
            if end <= split
            else head + tuple(self._output[max(0, start - split) : end - split])
        )

    def digests(self, count: int) -> Sequence[Digest]:
        """The names of the first pages; at least `count`, which must be full."""
        known = self._digests
        if count > len(known):
            size = self.page_size
            parent = known[-1] if known else self.root
            known += page_digests(parent, self.tokens(len(known) * size, count * size), size)
        return known


class PageEvent(NamedTuple):
    """A page that can be found from now on, or no more. Numbers count from 0 without a gap.

    `parent` is the name of the page before it, or the root; `generated` says whether decode steps
    have written any of it.
    """

    number: int
    stored: bool  # else removed
    digest: Digest
    parent: Digest
    generated: bool


@dataclass(slots=True, eq=False)
class _Node:
    """A page whose content is known."""

    digest: Digest
    parent_digest: Digest
    parent: "_Node | None"
    page: int
    generated: bool
    tokens: tuple[int, ...] | None  # kept to compare contents, while debugging
    num_cached_children: int = 0
    used_at: int = 0  # when a sequence left it
    cached: bool = False  # nobody holds the page


class PrefixIndex:
    """Finds pages by name, and chooses those to give up. Knows no reference counts: it is told.

    Those go first that were left the longest time ago and that no kept page continues. A page may
    outlive the one before it, where two sequences had computed that one: it is found again once
    somebody computes the missing one.
    """

    def __init__(self, *, compare_tokens: bool = False) -> None:
        """With `compare_tokens`, two contents of one name are an error, not one of them."""
        self._nodes: dict[Digest, _Node] = {}
        self._of_page: dict[int, _Node] = {}
        self._leaves: list[tuple[int, int, _Node]] = []  # a heap; entries may be out of date
        self._time = 0
        self._num_events = 0
        self._events = deque[PageEvent](maxlen=_MAX_EVENTS)
        self.num_evicted = 0
        self._compare_tokens = compare_tokens

    def __len__(self) -> int:
        return len(self._nodes)

    def has(self, page: int) -> bool:
        """Whether `page` can be found."""
        return page in self._of_page

    def match(self, digests: Iterable[Digest]) -> list[int]:
        """The pages of the longest start of `digests` of which all are here."""
        pages: list[int] = []
        nodes = self._nodes
        for digest in digests:
            node = nodes.get(digest)
            if node is None:
                break
            pages.append(node.page)
        return pages

    def insert(
        self,
        page: int,
        chain: PageChain,
        index: int,
        *,
        generated: bool,
    ) -> None:
        """Names a used `page`, which is number `index` of `chain`.

        Nothing happens if another page has this content: this one is freed when it is left.

        Raises:
            EngineError: the other page has different tokens, and the index compares them.
        """
        digests = chain.digests(index + 1)
        digest = digests[index]
        tokens = None
        if self._compare_tokens:
            size = chain.page_size
            tokens = chain.tokens(index * size, (index + 1) * size)
        known = self._nodes.get(digest)
        if known is not None:
            if tokens != known.tokens:
                raise EngineError(
                    f"pages {page} and {known.page} of different tokens have one name"
                )
            return
        parent_digest = digests[index - 1] if index else chain.root
        node = _Node(digest, parent_digest, self._nodes.get(parent_digest), page, generated, tokens)
        self._nodes[digest] = self._of_page[page] = node
        self._tell(node, stored=True)

    def use(self, pages: Iterable[int]) -> None:
        """Notes that a sequence holds `pages`, some of which nobody had held."""
        for page in pages:
            node = self._of_page[page]
            if node.cached:
                self._leave_cached(node)

    def leave(self, pages: Iterable[int]) -> None:
        """Notes that nobody holds `pages` any more; of one sequence, the last page comes first."""
        self._time += 1
        for page in pages:
            node = self._of_page[page]
            node.cached = True
            node.used_at = self._time
            if node.parent is not None:
                node.parent.num_cached_children += 1
            self._offer(node)

    def evict(self, count: int) -> list[int]:
        """Forgets `count` pages that nobody holds; returns them in the order in which they go.

        Fewer, if there are no more.
        """
        pages: list[int] = []
        while len(pages) < count and self._leaves:
            used_at, _, node = heapq.heappop(self._leaves)
            if not node.cached or node.num_cached_children or used_at != node.used_at:
                continue  # out of date
            self._leave_cached(node)
            del self._nodes[node.digest], self._of_page[node.page]
            self._tell(node, stored=False)
            pages.append(node.page)
        self.num_evicted += len(pages)
        return pages

    def events(self, first: int) -> list[PageEvent] | None:
        """The events from number `first` on; None if some of them are not kept any more."""
        oldest = self._num_events - len(self._events)
        if first < oldest:
            return None
        return [event for event in self._events if event.number >= first]

    def stored(self) -> list[PageEvent]:
        """What a reader needs that has missed events: the pages that can be found, parents first.

        Their number is that of the latest event.
        """
        return [
            PageEvent(self._num_events - 1, True, node.digest, node.parent_digest, node.generated)
            for node in self._nodes.values()
        ]

    def audit(self, cached: Iterable[int]) -> list[str]:
        """Lists what is wrong if nobody holds the pages `cached`; for tests."""
        problems: list[str] = []
        cached = set(cached)
        children = dict.fromkeys(map(id, self._nodes.values()), 0)
        for digest, node in self._nodes.items():
            if node.digest != digest or self._of_page.get(node.page) is not node:
                problems.append(f"page {node.page} is not found under its name")
            if node.cached != (node.page in cached):
                problems.append(f"page {node.page}: cached is {node.cached}")
            if node.cached and id(node.parent) in children:
                children[id(node.parent)] += 1
        offered = {id(node) for used_at, _, node in self._leaves if used_at == node.used_at}
        for node in self._nodes.values():
            if node.num_cached_children != children[id(node)]:
                problems.append(f"page {node.page} miscounts what continues it")
            if node.cached and not node.num_cached_children and id(node) not in offered:
                problems.append(f"page {node.page} can never be evicted")
        if len(self._of_page) != len(self._nodes) or not cached <= set(self._of_page):
            problems.append("pages without a name are kept, or named twice")
        return problems

    def _offer(self, node: _Node) -> None:
        """Lets `node` be evicted, if it is cached and nothing that is kept continues it."""
        if node.cached and not node.num_cached_children:
            heapq.heappush(self._leaves, (node.used_at, node.page, node))

    def _leave_cached(self, node: _Node) -> None:
        node.cached = False
        if (parent := node.parent) is not None:
            parent.num_cached_children -= 1
            self._offer(parent)

    def _tell(self, node: _Node, *, stored: bool) -> None:
        event = PageEvent(self._num_events, stored, node.digest, node.parent_digest, node.generated)
        self._num_events += 1
        self._events.append(event)
