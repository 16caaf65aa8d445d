"""Full pages by the name of their content, so that prompts which begin alike share them.

vLLM's automatic prefix caching, and SGLang's RadixAttention: a name stands for all tokens up to the
end of its page, so a map from names to pages is the radix tree at the granularity of pages.
"""

import heapq
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from jserve.core.errors import EngineError
from jserve.core.pages import Digest, page_digests

_MAX_EVENTS = 1 << 16  # that are kept for a reader
_SPARE_ENTRIES = 64  # of leaves that are none any more


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
        if end <= split:
            return head
        return head + tuple(self._output[max(0, start - split) : end - split])

    def page_tokens(self, index: int) -> tuple[int, ...]:
        """The tokens of page `index`."""
        return self.tokens(index * self.page_size, (index + 1) * self.page_size)

    def digests(self, count: int) -> Sequence[Digest]:
        """The names of the first pages; at least `count`, which must be full."""
        known = self._digests
        if count > len(known):
            size = self.page_size
            parent = known[-1] if known else self.root
            start, end = len(known) * size, count * size
            split = len(self._prompt)
            if start >= split:  # no prompt in it: in half the time of the general case
                tokens = self._output[start - split : end - split]
            else:
                tokens = self.tokens(start, end)
            known += page_digests(parent, tokens, size)
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
class Node:
    """A page whose content is known, or will be. Only `PrefixIndex` looks inside."""

    page: int
    parent: "Node | None"
    generated: bool
    digest: Digest = b""  # empty until the content is known
    parent_digest: Digest = b""
    tokens: tuple[int, ...] | None = None  # kept to compare contents, while debugging
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
        self._nodes: dict[Digest, Node] = {}
        self._of_page: dict[int, Node] = {}
        self._leaves: list[tuple[int, int, Node]] = []  # a heap; entries may be out of date
        self._time = 0
        self._num_events = 0
        self._events = deque[tuple[bool, Node]](maxlen=_MAX_EVENTS)  # stored or removed
        self.num_evicted = 0
        self._compare_tokens = compare_tokens

    def __len__(self) -> int:
        return len(self._nodes)

    def has(self, page: int) -> bool:
        """Whether `page` is kept, under a name or until its tokens are known."""
        return page in self._of_page

    def match(self, chain: PageChain, count: int) -> list[int]:
        """The longest start of the first `count` pages of `chain` that is here.

        Raises:
            EngineError: a page has other tokens than its name says, and the index compares them.
        """
        pages: list[int] = []
        nodes = self._nodes
        for digest in islice(chain.digests(count), count):
            node = nodes.get(digest)
            if node is None:
                break
            if self._compare_tokens:
                _compare(node, chain, len(pages))
            pages.append(node.page)
        return pages

    def insert(self, page: int, chain: PageChain, index: int, *, generated: bool) -> None:
        """Names a used `page`, which is number `index` of `chain`.

        Nothing happens if another page has this content: this one is freed when it is left.

        Raises:
            EngineError: the other page has different tokens, and the index compares them.
        """
        node = Node(page, None, generated)
        if self._name(node, chain, index):
            node.parent = self._nodes.get(node.parent_digest)
            self._of_page[page] = node

    def expect(self, page: int, before: int | None) -> Node:
        """Keeps a used `page`, which goes on after page `before`, though its tokens are not known.

        It may be evicted, and is not found before `arrived` says what it holds.
        """
        parent = None if before is None else self._of_page.get(before)
        node = self._of_page[page] = Node(page, parent, generated=True)
        return node

    def arrived(self, node: Node, chain: PageChain, index: int) -> bool:
        """Names an expected page; False if another page has this content, or it was evicted."""
        return self.is_kept(node) and self._name(node, chain, index)

    def is_kept(self, node: Node) -> bool:
        """Whether an expected page was not evicted."""
        return self._of_page.get(node.page) is node

    def forget(self, node: Node) -> None:
        """Stops to keep a page that nobody holds; an expected one, unless `evict` asks."""
        self._leave_cached(node)
        del self._of_page[node.page]

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
            entry = heapq.heappop(self._leaves)
            if not _is_leaf(entry):
                continue
            node = entry[2]
            self.forget(node)
            if node.digest:
                del self._nodes[node.digest]
                self._tell(node, stored=False)
            pages.append(node.page)
        self.num_evicted += len(pages)
        return pages

    def events(self, first: int) -> list[PageEvent] | None:
        """The events from number `first` on; None if some of them are not kept any more."""
        oldest = self._num_events - len(self._events)
        if first < oldest:
            return None
        events = islice(self._events, first - oldest, None)
        return [
            PageEvent(number, stored, node.digest, node.parent_digest, node.generated)
            for number, (stored, node) in enumerate(events, first)
        ]

    def stored(self) -> list[PageEvent]:
        """Lists the pages that can be found, parents first, for a reader that has missed events.

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
        children = dict.fromkeys(map(id, self._of_page.values()), 0)
        for page, node in self._of_page.items():
            if node.page != page or (node.digest and self._nodes.get(node.digest) is not node):
                problems.append(f"page {page} is not found under its name")
            if not node.digest and not node.cached:
                problems.append(f"page {page} is used and has no name")
            if node.cached != (node.page in cached):
                problems.append(f"page {node.page}: cached is {node.cached}")
            if node.cached and id(node.parent) in children:
                children[id(node.parent)] += 1
        offered = {id(entry[2]) for entry in self._leaves if _is_leaf(entry)}
        for node in self._of_page.values():
            if node.num_cached_children != children[id(node)]:
                problems.append(f"page {node.page} miscounts what continues it")
            if node.cached and not node.num_cached_children and id(node) not in offered:
                problems.append(f"page {node.page} can never be evicted")
        if len(self._nodes) != sum(bool(node.digest) for node in self._of_page.values()):
            problems.append("a name stands for a page that is not kept")
        if not cached <= set(self._of_page):
            problems.append("a page is kept, and nothing is known of it")
        return problems

    def _name(self, node: Node, chain: PageChain, index: int) -> bool:
        """Lets `node` be found as page `index` of `chain`; False if another page already is."""
        digests = chain.digests(index + 1)
        digest = digests[index]
        known = self._nodes.setdefault(digest, node)
        if self._compare_tokens:
            node.tokens = chain.page_tokens(index)
            _compare(known, chain, index)
        if known is not node:
            return False
        node.digest = digest
        node.parent_digest = digests[index - 1] if index else chain.root
        self._tell(node, stored=True)
        return True

    def _offer(self, node: Node) -> None:
        """Lets `node` be evicted, if it is cached and nothing that is kept continues it."""
        if not node.cached or node.num_cached_children:
            return
        if len(self._leaves) > 2 * len(self._of_page) + _SPARE_ENTRIES:
            # Where nothing is ever evicted, entries that are out of date would stay for ever.
            leaves = {entry[2].page: entry for entry in self._leaves if _is_leaf(entry)}
            self._leaves = list(leaves.values())
            heapq.heapify(self._leaves)
        heapq.heappush(self._leaves, (node.used_at, node.page, node))

    def _leave_cached(self, node: Node) -> None:
        node.cached = False
        if (parent := node.parent) is not None:
            parent.num_cached_children -= 1
            self._offer(parent)

    def _tell(self, node: Node, *, stored: bool) -> None:
        # An event for each page and nobody to read most of them: they are made when they are read.
        self._events.append((stored, node))
        self._num_events += 1


def _compare(node: Node, chain: PageChain, index: int) -> None:
    """Raises EngineError if `node` is found as page `index` of `chain` and has other tokens."""
    if node.tokens != chain.page_tokens(index):
        raise EngineError(f"page {node.page} and one of different tokens have one name")


def _is_leaf(entry: tuple[int, int, Node]) -> bool:
    """Whether an entry of the heap of leaves is up to date."""
    used_at, _, node = entry
    return node.cached and not node.num_cached_children and used_at == node.used_at
