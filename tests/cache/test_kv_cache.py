"""The KV cache against a model of it: held pages, deltas for the device, room."""

from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jserve.cache.kv_cache import KVCache
from jserve.cache.layout import KVLayout, PageGroup, kv_layout, single_group
from jserve.cache.pages import NO_HIT, Hit, PageDelta, Pages, joined
from jserve.cache.prefix import PageChain
from jserve.core.errors import ConfigError
from jserve.core.model_spec import ModelSpec
from jserve.core.request import Request, SamplingParams
from jserve.core.step import NewPages

CHAIN = PageChain(b"", (), [], 4)


def layout(*page_sizes: int) -> KVLayout:
    return KVLayout(
        tuple(
            PageGroup(name=str(i), layers=(i,), window=0, page_size=size, page_bytes=1)
            for i, size in enumerate(page_sizes)
        )
    )


def page_count(sizes: tuple[int, ...], num_tokens: int) -> int:
    return sum(len(range(0, num_tokens, size)) for size in sizes)


class CacheMachine(RuleBasedStateMachine):
    """Sequences come with or without a hit, grow and go; the device applies deltas blindly."""

    @initialize(
        sizes=st.sampled_from(((4,), (1,), (4, 4), (3, 5), (2, 4, 4))), num_pages=st.integers(1, 24)
    )
    def start(self, sizes: tuple[int, ...], num_pages: int) -> None:
        self.sizes = sizes
        self.cache = KVCache(layout(*sizes), num_pages)
        self.held: list[Pages] = []
        self.lengths: list[int] = []  # tokens that each must hold
        self.device: list[list[list[int]]] = []  # page tables of each, by group

    def tell(self, index: int, delta: PageDelta) -> None:
        for group, first, ids in delta:
            assert ids
            assert first == len(self.device[index][group]), "a gap or an overlap"
            self.device[index][group] += ids

    @rule()
    def enter(self) -> None:
        pages, delta = self.cache.adopt(NO_HIT, CHAIN, 0)
        assert delta == ()
        self.add(pages, delta, 0)

    def add(self, pages: Pages, delta: PageDelta, num_tokens: int) -> None:
        self.held.append(pages)
        self.lengths.append(num_tokens)
        self.device.append([[] for _ in self.sizes])
        self.tell(len(self.held) - 1, delta)

    @precondition(lambda self: any(self.lengths))
    @rule(data=st.data())
    def enter_with_a_hit(self, data: st.DataObject) -> None:
        """Starts with the full pages of another sequence, as far as every group has them."""
        index = data.draw(st.sampled_from([i for i, n in enumerate(self.lengths) if n]))
        most = min(self.lengths[index] // size * size for size in self.sizes)
        whole = [n for n in range(most + 1) if all(n % size == 0 for size in self.sizes)]
        num_tokens = data.draw(st.sampled_from(whole))
        tables = tuple(
            tuple(table[: num_tokens // size])
            for table, size in zip(self.device[index], self.sizes, strict=True)
        )
        hit = Hit(num_tokens, tables, sum(map(len, tables)), num_evictable=0)
        more = num_tokens + data.draw(st.integers(0, 9))
        free = self.cache.num_free
        cost = self.cache.cost(hit, more)
        pages, delta = self.cache.adopt(hit, CHAIN, 0)
        assert self.cache.num_free == free  # sharing takes nothing
        self.add(pages, delta, num_tokens)
        fits = self.cache.grow(pages, more)
        assert (fits is not None) == (cost <= free)
        if fits is not None:
            self.tell(len(self.held) - 1, fits)
            self.lengths[-1] = more
            assert self.cache.num_free == free - cost

    @precondition(lambda self: self.held)
    @rule(data=st.data(), sizes=st.lists(st.integers(0, 40), min_size=1, max_size=4))
    def grow(self, data: st.DataObject, sizes: list[int]) -> None:
        """Grows several times: one draw in six would seldom come to a second growth."""
        for num_tokens in sizes:
            self.grow_once(data.draw(st.integers(0, len(self.held) - 1)), num_tokens)

    def grow_once(self, index: int, num_tokens: int) -> None:
        pages, free = self.held[index], self.cache.num_free
        missing = self.cache.missing(pages, num_tokens)
        held = sum(map(len, self.device[index]))
        assert missing == max(
            0, sum(max(0, len(range(0, num_tokens, s)) - len(t)) for t, s in self.tables(index))
        )
        delta = self.cache.grow(pages, num_tokens)
        if missing > free:
            assert delta is None
            assert (self.cache.num_free, pages.num_pages) == (free, held)
            return
        assert delta is not None
        self.tell(index, delta)
        self.lengths[index] = max(self.lengths[index], num_tokens)
        assert self.cache.num_free == free - missing

    def tables(self, index: int) -> list[tuple[list[int], int]]:
        return list(zip(self.device[index], self.sizes, strict=True))

    @rule(more=st.lists(st.integers(0, 12), min_size=10, max_size=10))
    def ask_for_all(self, more: list[int]) -> None:
        """Growth of all at once is what growing one after the other comes to."""
        wanted = [n + m for n, m in zip(self.lengths, more, strict=False)]
        asked = list(zip(self.held, wanted, strict=False))
        missing = sum(self.cache.missing(pages, n) for pages, n in asked)
        assert self.cache.can_grow(asked) == (missing <= self.cache.num_free)
        if self.cache.can_all_grow(len(self.held), more[0]):
            assert self.cache.can_grow(
                (pages, n + more[0]) for pages, n in zip(self.held, self.lengths, strict=True)
            )
        room = self.cache.admission_room(asked, num_running=3, headroom_pages=2, max_tokens=40)
        left = self.cache.num_free - missing - 2 * 3
        for num_tokens in more:
            cost = page_count(self.sizes, num_tokens)
            assert room.fits(NO_HIT, num_tokens) == (cost <= left)
            if cost <= left:
                room.take(NO_HIT, num_tokens)
                left -= cost + 2

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.held) - 1))
        pages = self.held.pop(index)
        self.cache.release(pages, 0)
        assert (pages.capacity, pages.num_pages) == (0, 0)
        del self.lengths[index], self.device[index]

    @invariant()
    def the_books_agree(self) -> None:
        assert self.cache.audit(self.held) == []
        used = {page for tables in self.device for table in tables for page in table}
        assert self.cache.num_free == self.cache.num_pages - len(used)
        for index, pages in enumerate(self.held):
            assert pages.tables == self.device[index]
            assert pages.capacity == min(len(table) * size for table, size in self.tables(index))
            room = self.cache.room(pages)
            assert room >= pages.capacity
            assert self.cache.missing(pages, room) <= self.cache.num_free
            assert self.cache.missing(pages, room + 1) > self.cache.num_free
        assert self.cache.pages_for(11) == page_count(self.sizes, 11)


TestKVCache = CacheMachine.TestCase
TestKVCache.settings = settings(
    max_examples=80, stateful_step_count=30, deadline=None, derandomize=True
)


def test_the_group_with_the_least_room_limits_what_pages_hold() -> None:
    cache = KVCache(layout(3, 5), 10)
    pages, _ = cache.adopt(NO_HIT, CHAIN, 0)
    assert cache.grow(pages, 7) == (NewPages(0, 0, (1, 2, 3)), NewPages(1, 0, (4, 5)))
    assert pages.capacity == 9
    assert cache.grow(pages, 10) == (NewPages(0, 3, (6,)),)
    assert pages.capacity == 10


def test_nothing_is_found_yet() -> None:
    request = Request(id="a", prompt=(1, 2, 3), sampling=SamplingParams(max_tokens=1))
    cache = KVCache(single_group(1), 4)
    assert cache.match(cache.chain(request, [])) == NO_HIT


def test_an_evictable_hit_costs_what_it_takes_from_others() -> None:
    cache = KVCache(single_group(4), 10)
    hit = Hit(8, ((1, 2),), num_pages=2, num_evictable=1)
    assert cache.cost(hit, 16) == 3  # two pages are missing, one can be evicted no more


def test_the_hits_of_a_step_have_as_many_entries_as_one_sequence() -> None:
    cache = KVCache(single_group(4), 100)
    room = cache.admission_room((), num_running=0, headroom_pages=0, max_tokens=17)
    five, one = Hit(20, ((1, 2, 3, 4, 5),), num_pages=5), Hit(4, ((1,),), num_pages=1)
    four = Hit(16, ((1, 2, 3, 4),), num_pages=4)
    assert room.fits(five, 21)
    room.take(NO_HIT, 21)
    assert room.fits(five, 21)  # what has no hit fills no entries
    room.take(four, 17)
    assert room.fits(one, 21)
    room.take(one, 21)
    assert not room.fits(one, 21)
    assert room.fits(NO_HIT, 21)


def test_the_audit_sees_a_page_that_nobody_holds() -> None:
    cache = KVCache(single_group(4), 3)
    pages, _ = cache.adopt(NO_HIT, CHAIN, 0)
    cache.grow(pages, 5)
    assert cache.audit([pages]) == []
    assert cache.audit([]) == [
        "page 1 has 1 references, 0 holders",
        "page 2 has 1 references, 0 holders",
    ]
    assert "page 1 has 1 references, 2 holders" in cache.audit([pages, pages])


def test_deltas_that_follow_each_other_become_one() -> None:
    first = (NewPages(0, 0, (3, 4)), NewPages(1, 0, (5,)))
    then = (NewPages(0, 2, (6,)), NewPages(2, 0, (7,)))
    assert joined(first, then) == (
        NewPages(0, 0, (3, 4, 6)),
        NewPages(1, 0, (5,)),
        NewPages(2, 0, (7,)),
    )
    assert joined((), then) == then
    assert joined(first, ()) == first


def test_the_layout_of_a_model() -> None:
    spec = ModelSpec(
        family="gemma3",
        vocab=8,
        layers=3,
        model_dim=8,
        ffn_dim=8,
        q_heads=4,
        kv_heads=2,
        head_dim=16,
        max_position=64,
        norm_eps=1e-5,
        rope_theta=1e4,
        sliding_window=8,
        local_layers=(True, True, False),
    )
    found = kv_layout(spec, page_size=4, kv_heads=2, value_bytes=2)
    [group] = found.groups
    assert (group.layers, group.window, group.page_size) == ((0, 1, 2), 0, 4)
    # K and V × heads × tokens × head_dim × layers × bytes.
    assert found.page_bytes == group.page_bytes == 2 * 2 * 4 * 16 * 3 * 2


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ((), "there must be one"),
        (layout(2).groups * 2, "no name twice"),
        ((replace(layout(2).groups[0], page_size=0),), "page_size is 0"),
    ],
    ids=["none", "one name twice", "no tokens"],
)
def test_bad_layouts_are_refused(groups: tuple[PageGroup, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        KVLayout(groups)
