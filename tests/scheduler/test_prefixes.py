"""Sequences share the pages of prompts that begin alike, also while those are being computed."""

from dataclasses import replace

import pytest

from jserve.cache import prefix
from jserve.cache.kv_cache import KVCache, PrefixSharing
from jserve.cache.layout import single_group
from jserve.core.errors import EngineError
from jserve.core.request import Request, SamplingParams
from jserve.core.step import StepPlan
from jserve.scheduler.config import SchedulerConfig
from tests.scheduler.rig import Rig, admitted, names

SHARING = PrefixSharing(compare_tokens=True)
PROMPT = tuple(range(10, 33))  # five full pages of four tokens, and three tokens


def sharing_rig(config: SchedulerConfig | None = None, *, num_pages: int = 100) -> Rig:
    return Rig(config, cache=KVCache(single_group(4), num_pages, SHARING), num_pages=num_pages)


def add(rig: Rig, name: str, prompt: tuple[int, ...] = PROMPT, **fields: object) -> Request:
    sampling = {"max_tokens": 6} | fields.pop("sampling", {})  # pyright: ignore
    request = Request(id=name, prompt=prompt, sampling=SamplingParams(**sampling), **fields)  # pyright: ignore
    rig.scheduler.add(request, rig.now_s)
    return request


def check(rig: Rig, *requests: Request) -> None:
    """All answers are right, and nothing is lost."""
    for request in requests:
        assert rig.outputs[request.id] == rig.model.generate(request, 100)[0]
    assert rig.scheduler.audit().problems == ()
    assert rig.is_empty()


def computed(plans: list[StepPlan]) -> dict[str, int]:
    """Prompt tokens that each request computed."""
    counts: dict[str, int] = {}
    for plan in plans:
        for chunk in plan.chunks:
            counts[chunk.request_id] = counts.get(chunk.request_id, 0) + len(chunk.tokens)
    return counts


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_a_burst_with_one_prompt_computes_its_full_pages_once(depth: int) -> None:
    rig = sharing_rig()
    requests = [add(rig, name) for name in "abcd"]
    assert computed(rig.run(depth)) == {"a": 23, "b": 3, "c": 3, "d": 3}
    check(rig, *requests)
    stats = rig.scheduler.stats()
    assert (stats.prefix_query_tokens, stats.prefix_hit_tokens) == (4 * 23, 3 * 20)


def test_nothing_is_shared_within_a_step_and_all_from_the_next_plan_on() -> None:
    rig = sharing_rig()
    add(rig, "a")
    add(rig, "b")
    assert admitted(rig.plan()) == ["a"]
    plan = rig.plan()  # the step before has not ended
    assert admitted(plan) == ["b"]
    assert plan.admissions[0].num_computed == 20
    assert plan.chunks[-1].pages[0].ids[:5] == rig.executor.plans[0].chunks[0].pages[0].ids[:5]


def test_a_waiter_follows_the_chunks_of_the_one_that_it_waits_for() -> None:
    """It needs the first three pages only, so it enters as soon as these are planned."""
    rig = sharing_rig(SchedulerConfig(step_tokens=8, max_partial_prefills=2))
    first = add(rig, "a")
    second = add(rig, "b", (*PROMPT[:12], 1, 2, 3))
    plans = rig.run(depth=2)
    assert [names(plan) for plan in plans[:3]] == [["a"], ["a"], ["a", "b"]]
    assert computed(plans) == {"a": 23, "b": 3}
    check(rig, first, second)


def test_generated_tokens_are_found_once_their_page_is_committed() -> None:
    rig = sharing_rig()
    first = add(rig, "a", sampling={"max_tokens": 14})
    rig.run()
    answer = rig.outputs["a"]
    # The last token was never computed, and of the 36 others nine pages are full.
    second = add(rig, "b", (*PROMPT, *answer, 7, 8))
    [admission] = rig.plan().admissions
    assert admission.num_computed == 36
    rig.commit()
    rig.run()
    check(rig, first, second)


def test_generated_tokens_of_a_running_sequence_are_shared() -> None:
    rig = sharing_rig()
    first = add(rig, "a", sampling={"max_tokens": 60})
    while len(rig.outputs.get("a", ())) < 20:
        rig.step()
    second = add(rig, "b", (*PROMPT, *rig.outputs["a"], 7))
    [admission] = rig.plan().admissions
    known = len(PROMPT) + len(rig.outputs["a"]) - 1
    assert admission.num_computed == known // 4 * 4
    rig.run()
    check(rig, first, second)


def test_only_pages_of_prompts_are_shared_where_decode_steps_round_differently() -> None:
    cache = KVCache(single_group(4), 100, replace(SHARING, generated=False))
    rig = Rig(cache=cache)
    add(rig, "a", sampling={"max_tokens": 14})
    rig.run()
    add(rig, "b", (*PROMPT, *rig.outputs["a"], 7, 8))
    assert rig.plan().admissions[0].num_computed == 20


def test_a_hit_never_reaches_into_a_page_that_is_being_filled() -> None:
    rig = sharing_rig()
    first = add(rig, "a", sampling={"max_tokens": 40})
    rig.step()
    # Its last three prompt tokens, and one of the answer, fill a page that is not known yet.
    second = add(rig, "b", (*PROMPT, 90, 91))
    assert rig.plan().admissions[0].num_computed == 20
    rig.run()
    check(rig, first, second)


@pytest.mark.parametrize("length", [19, 20, 21])
def test_the_last_token_of_a_known_prompt_is_computed(length: int) -> None:
    rig = sharing_rig()
    first = add(rig, "a", PROMPT[:length])
    rig.run()
    second = add(rig, "b", PROMPT[:length])
    plans = rig.run()
    found = (length - 1) // 4 * 4
    assert plans[0].admissions[0].num_computed == found
    assert computed(plans) == {"b": length - found}
    check(rig, first, second)


def test_another_salt_neither_finds_nor_waits() -> None:
    """The plans are those of an engine that has never seen the prompt."""
    plans: list[list[StepPlan]] = []
    for others in (True, False):
        rig = sharing_rig()
        if others:
            add(rig, "known", cache_salt="theirs")
            rig.run()
        requests = [add(rig, "a", cache_salt="mine"), add(rig, "b", cache_salt="third")]
        plans.append(rig.run(depth=2))
        check(rig, *requests)
    assert [computed(run) for run in plans] == [{"a": 23, "b": 23}] * 2
    with_others, alone = [[(names(plan), plan.num_steps) for plan in run] for run in plans]
    assert with_others == alone


def test_those_who_wait_for_a_page_are_passed_over_a_few_times() -> None:
    config = SchedulerConfig(step_tokens=5, max_partial_prefills=4, max_overtakes=2)
    rig = sharing_rig(config)
    first = add(rig, "a")
    second = add(rig, "b")
    others = [
        add(rig, name, (50 + i, 51), sampling={"max_tokens": 1}) for i, name in enumerate("cdef")
    ]
    order: list[str] = []
    while "b" not in order:
        order += admitted(rig.step()[0])
    assert order == ["a", "c", "d", "b"]  # b computes what a has not planned by then
    rig.run()
    check(rig, first, second, *others)


def test_many_who_wait_for_one_page_hold_up_no_other_tenant() -> None:
    rig = sharing_rig(SchedulerConfig(step_tokens=5, max_partial_prefills=4))
    requests = [add(rig, f"a{i}", tenant="a") for i in range(12)]
    others = [add(rig, "b0", (50, 51), tenant="b")]
    assert admitted(rig.step()[0]) == ["a0", "b0"]
    others.append(add(rig, "b1", (52, 53), tenant="b"))  # a's turn was before b's
    assert admitted(rig.step()[0]) == ["b1"]
    rig.run(depth=2)
    check(rig, *others, *requests)


def test_whoever_waits_for_an_aborted_owner_computes_the_rest() -> None:
    rig = sharing_rig(SchedulerConfig(step_tokens=8))
    add(rig, "a")
    second = add(rig, "b")
    assert names(rig.plan()) == ["a"]
    assert rig.scheduler.abort("a")  # the step of its first two pages is in flight
    plan = rig.plan()
    assert admitted(plan) == ["b"]
    assert plan.admissions[0].num_computed == 8
    rig.run(depth=2)
    check(rig, second)


def test_whoever_waits_for_a_preempted_owner_is_not_stuck() -> None:
    """The one that preempts takes pages of the owner, whose place in the queue is before b's."""
    rig = sharing_rig(SchedulerConfig(step_tokens=4, headroom_pages=0), num_pages=10)
    taker = add(rig, "taker", (90, 91, 92), priority=-1, sampling={"max_tokens": 30})
    while len(rig.outputs.get("taker", ())) < 5:
        rig.step()
    first, second = add(rig, "a"), add(rig, "b")
    rig.run(depth=2)
    for request in (taker, first, second):
        assert rig.outputs[request.id] == rig.model.generate(request, 100)[0]
    assert rig.scheduler.audit().problems == ()
    assert rig.scheduler.stats().num_preemptions > 0


def test_pages_are_evicted_though_a_waiting_sequence_would_have_found_them() -> None:
    rig = sharing_rig(SchedulerConfig(headroom_pages=0), num_pages=12)
    add(rig, "a")
    rig.run()
    assert rig.scheduler.stats().cached_pages >= 5
    # It takes every slot's worth of memory, so what a left must go before b is admitted.
    large = add(rig, "large", tuple(range(40, 80)), sampling={"max_tokens": 8})
    second = add(rig, "b")
    rig.run(depth=2)
    assert rig.scheduler.stats().prefix_evicted_pages > 0
    for request in (large, second):
        assert rig.outputs[request.id] == rig.model.generate(request, 100)[0]
    assert rig.scheduler.audit().problems == ()


def test_the_head_of_the_queue_does_not_evict_its_own_hit() -> None:
    """Ten pages: five are cached, and the newcomer needs eleven less those five."""
    rig = sharing_rig(SchedulerConfig(headroom_pages=0), num_pages=11)
    add(rig, "a", sampling={"max_tokens": 1})
    rig.run()
    second = add(rig, "b", (*PROMPT[:20], *range(40, 60)), sampling={"max_tokens": 1})
    [admission] = rig.plan().admissions
    assert admission.num_computed == 20
    rig.run()
    assert rig.outputs["b"] == rig.model.generate(second, 100)[0]


def test_prompt_logprobs_neither_look_nor_wait() -> None:
    rig = sharing_rig(SchedulerConfig(step_tokens=8, max_partial_prefills=2))
    add(rig, "a")
    add(rig, "b", sampling={"prompt_logprobs": 1})
    assert admitted(rig.plan()) == ["a", "b"]
    assert rig.in_flight[0].admissions[1].num_computed == 0
    assert computed(rig.run()) == {"a": 23 - 4, "b": 23 - 4}


def test_a_name_of_two_contents_is_an_error_while_debugging(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        prefix, "page_digests", lambda parent, tokens, size: [b"same"] * (len(tokens) // size)
    )
    rig = sharing_rig()
    add(rig, "a", (1, 2, 3, 4, 5), sampling={"max_tokens": 1})
    rig.run()
    add(rig, "b", (6, 7, 8, 9, 10))
    with pytest.raises(EngineError, match="different tokens have one name"):
        rig.plan()
