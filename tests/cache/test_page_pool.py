"""The page pool against a model of it, and what it refuses."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from jserve.cache.page_pool import PagePool

NUM_PAGES = 7


class PoolMachine(RuleBasedStateMachine):
    """Takes, shares and releases at random; the model is a list of free ids and a count per id."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(NUM_PAGES)
        self.free = list(range(1, NUM_PAGES + 1))
        self.refs: dict[int, int] = {}

    @rule(count=st.integers(0, NUM_PAGES + 1))
    def take(self, count: int) -> None:
        if count > len(self.free):
            with pytest.raises(ValueError, match="free"):
                self.pool.take(count)
            return
        expected, self.free = self.free[:count], self.free[count:]
        assert self.pool.take(count) == expected
        self.refs.update(dict.fromkeys(expected, 1))

    @precondition(lambda self: self.refs)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        page = data.draw(st.sampled_from(sorted(self.refs)))
        self.pool.share([page])
        self.refs[page] += 1

    @precondition(lambda self: self.refs)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        pages = data.draw(st.lists(st.sampled_from(sorted(self.refs)), unique=True))
        self.pool.release(pages)
        for page in pages:
            self.refs[page] -= 1
            if self.refs[page] == 0:
                del self.refs[page]
                self.free.append(page)

    @invariant()
    def counts_agree(self) -> None:
        assert self.pool.num_free == len(self.free)
        for page in range(1, NUM_PAGES + 1):
            assert self.pool.num_refs(page) == self.refs.get(page, 0)


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


def test_needs_a_page() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        PagePool(0)
