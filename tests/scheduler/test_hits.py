"""Sequences start with computed tokens, given by caches that keep what they had."""

import pytest

from jserve.cache.kv_cache import KVCache
from jserve.cache.layout import single_group
from jserve.cache.pages import NO_HIT, Hit, PageDelta, Pages
from jserve.cache.prefix import PageChain
from jserve.core import step
from jserve.core.request import Request
from jserve.core.step import ProgramKind
from jserve.scheduler.config import SchedulerConfig
from tests.scheduler.rig import Rig, admitted, names
from tests.scheduler.sharing_cache import SharingCache


class KeepingCache(KVCache):
    """Keeps what a sequence computed, for itself alone, as if its pages were moved out and in."""

    def __init__(self, num_pages: int = 100) -> None:
        super().__init__(single_group(4), num_pages)
        self.kept: dict[tuple[int, ...], tuple[int, ...]] = {}
        self.refuses = False  # no page is free until somebody is preempted

    def match(self, chain: PageChain) -> Hit:
        tokens = chain.tokens()
        ids = self.kept.get(tokens[:-1])
        return NO_HIT if ids is None else Hit(len(tokens) - 1, (ids,), len(ids))

    def adopt(self, hit: Hit, chain: PageChain, num_context: int) -> tuple[Pages, PageDelta]:
        pages = super().adopt(hit, chain, num_context)
        if hit.num_pages:
            self._pool.release(hit.tables[0])
        return pages

    def grow(self, pages: Pages, num_tokens: int) -> PageDelta | None:
        if self.refuses and num_tokens > pages.capacity:
            return None
        return super().grow(pages, num_tokens)

    def release(self, pages: Pages, num_tokens: int) -> None:
        tokens = pages.chain.tokens(0, num_tokens)
        self.refuses = False
        ids = tuple(pages.tables[0][: self.pages_for(len(tokens))])
        self._pool.share(ids)
        self.kept[tokens] = ids
        super().release(pages, num_tokens)


def preempted(**sampling: object) -> tuple[Rig, Request]:
    """Two sequences, of which the second was just preempted and can come back at once."""
    cache = KeepingCache()
    rig = Rig(SchedulerConfig(decode_steps=1), cache=cache, max_processor_rows=2)
    rig.add("a", prompt=4, max_tokens=30)
    second = rig.add("b", prompt=4, max_tokens=30, **sampling)
    while len(rig.outputs.get("b", ())) < 5:
        rig.step()
    cache.refuses = True
    assert names(rig.step()[0]) == ["a"]
    assert rig.scheduler.stats().num_preemptions == 1
    return rig, second


def test_a_sequence_of_which_only_the_last_token_is_missing_starts_with_a_decode_row() -> None:
    rig, second = preempted()
    plan, _ = rig.step()
    [admission] = plan.admissions
    assert admission.num_computed == 4 + 5 - 1
    assert admission.last_token == admission.output[-1]
    assert names(plan) == ["a", "b"]
    assert [chunk.tokens for chunk in plan.chunks] == [(), ()]
    assert plan.program.kind is ProgramKind.MIXED
    rig.run(depth=2)
    assert rig.outputs["b"] == rig.model.generate(second, 100)[0]


@pytest.mark.parametrize(("pairs", "num_computed"), [(3, 8), (2, 0)])
def test_a_history_that_fits_into_no_step_is_computed_again(
    monkeypatch: pytest.MonkeyPatch, pairs: int, num_computed: int
) -> None:
    monkeypatch.setattr(step, "HISTORY_PAIRS", pairs)  # five tokens in two rows, or in three
    rig, second = preempted(presence_penalty=0.5)
    [admission] = rig.step()[0].admissions
    assert admission.num_computed == num_computed
    rig.run()
    assert rig.outputs["b"] == rig.model.generate(second, 100)[0]


def after_a_long_prompt() -> Rig:
    """The first 40 tokens of every prompt are known; a sequence has 44 at most."""
    cache = SharingCache(4, 100, seed=0, keep=1.0)
    rig = Rig(max_model_len=44, cache=cache)
    rig.add("a", prompt=41, max_tokens=1)
    rig.run()
    return rig


def test_hits_shorten_prompts_and_free_pages_stay_free() -> None:
    rig = after_a_long_prompt()
    request = rig.add("b", prompt=41, max_tokens=3)
    plan, _ = rig.step()
    assert [(c.start, c.num_tokens, c.max_new) for c in plan.chunks] == [(40, 1, 1)]
    assert [(new.first, len(new.ids)) for new in plan.chunks[0].pages] == [(0, 11)]
    assert rig.scheduler.stats().free_pages == 100 - 11
    rig.run()
    assert rig.outputs["b"] == rig.model.generate(request, 100)[0]
    assert rig.scheduler.audit().problems == ()


def test_a_step_takes_the_pages_of_one_long_hit() -> None:
    rig = after_a_long_prompt()
    requests = [rig.add(name, prompt=41, max_tokens=3) for name in "bcd"]
    assert [admitted(rig.step()[0]) for _ in range(3)] == [["b"], ["c"], ["d"]]
    rig.run()
    for request in requests:
        assert rig.outputs[request.id] == rig.model.generate(request, 100)[0]


def test_prompt_logprobs_are_computed_though_the_prompt_is_known() -> None:
    rig = after_a_long_prompt()
    rig.add("b", prompt=41, max_tokens=1, prompt_logprobs=1)
    plans = rig.run()
    assert plans[0].admissions[0].num_computed == 0
    assert sum(len(chunk.prompt_targets) for plan in plans for chunk in plan.chunks) == 40


def test_the_whole_prompt_is_never_a_hit() -> None:
    cache = KeepingCache()
    cache.match = lambda chain: Hit(chain.num_tokens)
    rig = Rig(cache=cache)
    rig.add("a")
    with pytest.raises(ValueError, match="a hit of 3 tokens leaves none to compute"):
        rig.plan()
