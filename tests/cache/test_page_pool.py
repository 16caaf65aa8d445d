"""The page pool against a model of it, and its refusals."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from jserve.cache.page_pool import PagePool

NUM_PAGES = 7
PAGES = range(1, NUM_PAGES + 1)


class PoolMachine(RuleBasedStateMachine):
    """Random orders beside a model: lists of free and of cached ids, and a count per used id.

    The evictor gives the page that was cached last, so that its choice is seen to count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(NUM_PAGES, evict=lambda count: self.cached[::-1][:count])
        self.free = list(PAGES)
        self.cached: list[int] = []
        self.refs: dict[int, int] = {}

    @rule(count=st.integers(0, NUM_PAGES + 1))
    def take(self, count: int) -> None:
        if count > len(self.free) + len(self.cached):
            with pytest.raises(ValueError, match="free"):
                self.pool.take(count)
            return
        num_evicted = max(0, count - len(self.free))
        self.free += self.cached[::-1][:num_evicted]
        expected = self.free[:count]
        assert self.pool.take(count) == expected
        del self.cached[len(self.cached) - num_evicted :]
        del self.free[:count]
        self.refs.update(dict.fromkeys(expected, 1))

    @precondition(lambda self: self.refs or self.cached)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(sorted([*self.refs, *self.cached])))
        self.pool.share([page])
        if page in self.cached:
            self.cached.remove(page)
        self.refs[page] = self.refs.get(page, 0) + 1

    @precondition(lambda self: self.refs)
    @rule(data=st.data(), keep=st.booleans())
    def release(self, data: st.DataObject, keep: bool) -> None:
        pages = data.draw(st.lists(st.sampled_from(sorted(self.refs)), unique=True))
        self.pool.release(pages, keep=keep)
        for page in pages:
            self.refs[page] -= 1
            if self.refs[page] == 0:
                del self.refs[page]
                (self.cached if keep else self.free).append(page)

    @precondition(lambda self: self.cached)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(self.cached))
        self.pool.drop([page])
        self.cached.remove(page)
        self.free.append(page)

    @invariant()
    def states_agree(self) -> None:
        assert self.pool.num_free == len(self.free) + len(self.cached)
        assert self.pool.num_cached == len(self.cached)
        for page in PAGES:
            assert self.pool.num_refs(page) == self.refs.get(page, 0)
            assert self.pool.is_cached(page) == (page in self.cached)
        assert self.pool.audit() == []


TestPagePool = PoolMachine.TestCase
TestPagePool.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, derandomize=True
)


def test_the_null_page_is_never_handed_out() -> None:
    assert 0 not in PagePool(5).take(5)


@pytest.mark.parametrize("page", [0, 2])
def test_refuses_pages_that_are_not_in_use(page: int) -> None:
    pool = PagePool(2)
    pool.take(1)
    with pytest.raises(ValueError, match=f"page {page} is not in use"):
        pool.release([page])
    with pytest.raises(ValueError, match=f"page {page} is not in use"):
        pool.share([page])


def test_a_shared_page_outlives_its_first_owner() -> None:
    pool = PagePool(1)
    pages = pool.take(1)
    pool.share(pages)
    pool.release(pages)
    assert pool.num_free == 0
    pool.release(pages)
    assert pool.take(1) == pages


def test_a_cached_page_is_kept_while_others_are_free() -> None:
    pool = PagePool(3)
    first = pool.take(1)
    pool.release(first, keep=True)
    assert pool.num_free == 3
    assert pool.take(2) == [2, 3]
    assert pool.is_cached(first[0])
    pool.share(first)  # a hit: it is used again
    assert pool.num_free == 0
    pool.release(first, keep=True)
    assert pool.take(1) == first  # evicted at last
    assert not pool.is_cached(first[0])


def test_without_an_evictor_the_page_cached_longest_ago_goes_first() -> None:
    pool = PagePool(3)
    pool.take(3)
    for page in (2, 3, 1):
        pool.release([page], keep=True)
    assert pool.take(2) == [2, 3]


@pytest.mark.parametrize(
    ("evicted", "message"),
    [([], "0 pages were evicted, not 1"), ([1], "page 1 is not cached"), ([2, 2], "2 pages were")],
    ids=["too few", "a used page", "too many"],
)
def test_an_evictor_that_errs_takes_no_page(evicted: list[int], message: str) -> None:
    pool = PagePool(2, evict=lambda count: evicted)
    pool.take(2)
    pool.release([2], keep=True)
    with pytest.raises(ValueError, match=message):
        pool.take(1)
    assert pool.is_cached(2)
    assert pool.audit() == []


def test_only_cached_pages_are_dropped() -> None:
    pool = PagePool(2)
    with pytest.raises(ValueError, match="page 1 is not cached"):
        pool.drop([1])


def test_needs_a_page() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        PagePool(0)
