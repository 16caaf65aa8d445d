"""The index of pages by content, against a model that knows all tokens of all pages."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jserve.cache.prefix import PageChain, PrefixIndex
from jserve.core.pages import root_digest

SIZE = 2
ROOTS = [root_digest(weights="w", kv_dtype="f", page_size=SIZE, salt=salt) for salt in ("", "x")]


class IndexMachine(RuleBasedStateMachine):
    """Sequences of few tokens hold pages and leave them; some pages are given up.

    The model keeps, for each page, the root and all tokens up to the page's end, and the moment at
    which it was left.
    """

    @initialize()
    def start(self) -> None:
        self.index = PrefixIndex(compare_tokens=True)
        self.content: dict[int, tuple[bytes, tuple[int, ...]]] = {}
        self.left_at: dict[int, int] = {}  # pages that nobody holds
        self.holders: dict[int, int] = {}
        self.held: list[tuple[PageChain, list[int]]] = []
        self.next_page = 1
        self.time = 0
        self.names: dict[bytes, int] = {}  # as events tell
        self.num_events = 0

    @rule(
        root=st.sampled_from(ROOTS),
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=9),
        output=st.lists(st.integers(0, 1), max_size=3),
    )
    def enter(self, root: bytes, prompt: list[int], output: list[int]) -> None:
        """A sequence takes what it finds, and computes the rest in pages of its own."""
        chain = PageChain(root, tuple(prompt), output, SIZE)
        tokens = (*prompt, *output)
        full = len(tokens) // SIZE
        found = self.index.match(chain, full)
        wanted = [(root, tokens[: (i + 1) * SIZE]) for i in range(full)]
        for page, content in zip(found, wanted, strict=False):
            assert self.content[page] == content
        if len(found) < full:
            assert wanted[len(found)] not in self.content.values()
        self.index.use(found)
        pages = list(found)
        for page in found:
            self.left_at.pop(page, None)
        for at in range(len(found), full):
            page, self.next_page = self.next_page, self.next_page + 1
            known = wanted[at] in self.content.values()
            self.index.insert(page, chain, at, generated=False)
            assert self.index.has(page) is not known
            if not known:
                self.content[page] = wanted[at]
            pages.append(page)
        for page in pages:
            self.holders[page] = self.holders.get(page, 0) + 1
        self.held.append((chain, pages))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        _, pages = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        free: list[int] = []
        for page in reversed(pages):
            self.holders[page] -= 1
            if not self.holders[page] and self.index.has(page):
                free.append(page)
        self.time += 1
        self.left_at.update(dict.fromkeys(free, self.time))
        self.index.leave(free)

    @rule(count=st.integers(1, 4))
    def evict(self, count: int) -> None:
        for page in self.index.evict(count):
            leaves = [other for other in self.left_at if not self.is_continued(other)]
            assert page in leaves
            assert self.left_at[page] == min(self.left_at[leaf] for leaf in leaves)
            del self.content[page], self.left_at[page]
            count -= 1
        assert not count or not self.left_at

    def is_continued(self, page: int) -> bool:
        """Whether a page that nobody holds goes on after `page`."""
        root, tokens = self.content[page]
        return any(
            self.content[other][0] == root and self.content[other][1][:-SIZE] == tokens
            for other in self.left_at
        )

    @invariant()
    def events_tell_what_is_here(self) -> None:
        events = self.index.events(self.num_events)
        assert events is not None
        for event in events:
            assert event.number == self.num_events
            self.num_events += 1
            if event.stored:
                assert event.digest not in self.names
                self.names[event.digest] = event.number
            else:
                del self.names[event.digest]
        assert len(self.names) == len(self.index) == len(self.content)
        assert {event.digest for event in self.index.stored()} == set(self.names)

    @invariant()
    def the_books_agree(self) -> None:
        assert self.index.audit(self.left_at) == []


IndexMachine.TestCase.settings = settings(max_examples=100, deadline=None, derandomize=True)
TestIndex = IndexMachine.TestCase


def test_events_that_are_gone_are_not_made_up(monkeypatch) -> None:
    monkeypatch.setattr("jserve.cache.prefix._MAX_EVENTS", 3)
    index = PrefixIndex()
    chain = PageChain(ROOTS[0], tuple(range(10)), [], SIZE)
    for page in range(5):
        index.insert(page + 1, chain, page, generated=False)
    assert index.events(1) is None
    events = index.events(2)
    assert events is not None
    assert [event.number for event in events] == [2, 3, 4]
    assert [event.parent for event in events[1:]] == [event.digest for event in events[:-1]]
    assert index.events(5) == []
    assert [event.number for event in index.stored()] == [4] * 5


def test_a_chain_names_pages_across_prompt_and_output() -> None:
    output: list[int] = []
    chain = PageChain(ROOTS[0], (1, 2, 3), output, SIZE)
    whole = PageChain(ROOTS[0], (1, 2, 3, 4, 5, 6), [], SIZE)
    first = list(chain.digests(1))
    output += [4, 5, 6]
    assert (chain.num_tokens, chain.tokens(2, 5)) == (6, (3, 4, 5))
    assert list(chain.digests(3)) == list(whole.digests(3))
    assert list(chain.digests(3))[:1] == first
    assert [chain.page_tokens(i) for i in range(3)] == [(1, 2), (3, 4), (5, 6)]


def test_a_page_that_is_used_again_and_again_leaves_no_trace() -> None:
    index = PrefixIndex()
    chain = PageChain(ROOTS[0], (1, 2, 3, 4), [], SIZE)
    for page in range(2):
        index.insert(page + 1, chain, page, generated=False)
    for _ in range(1000):
        index.leave([2, 1])
        index.use([1, 2])
    assert len(index._leaves) < 100
    index.leave([2, 1])
    assert index.evict(3) == [2, 1]
