"""Answers are the same, bit for bit, whether or not computed pages are found and shared."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from jserve.cache.kv_cache import KVCache, PrefixSharing
from jserve.cache.layout import single_group
from jserve.core.pages import page_digests, root_of
from jserve.core.request import Request, SamplingParams
from jserve.pallas_kernels.backend import Backend
from jserve.scheduler.scheduler import Scheduler
from tests.engine.engine_harness import CONFIG, TINY, Harness, Outcome
from tests.engine.test_resume import KINDS

SHARING = PrefixSharing(compare_tokens=True)
PAGE = CONFIG.page_size
SYSTEM = tuple((5 * i + 2) % TINY.vocab for i in range(3 * PAGE + 1))


@pytest.fixture(scope="module")
def engine(programs_folder) -> Harness:
    harness = Harness(TINY, CONFIG, cache_folder=programs_folder)
    assert harness.model.backend is Backend.NATIVE
    return harness


def request(name: str, prompt: tuple[int, ...], choice: int = 0, **fields: object) -> Request:
    sampling = {"max_tokens": 2 * PAGE + 3, "ignore_eos": True, "logprobs": 3} | fields
    return Request(id=name, prompt=prompt, sampling=SamplingParams(**sampling), choice=choice)


def first_turns() -> list[Request]:
    """Two choices of every kind of sampling, after one system prompt."""
    return [
        request(f"{kind}/{choice}", (*SYSTEM, 3 + index, 4), choice, **fields)
        for index, (kind, fields) in enumerate(KINDS.items())
        for choice in range(2)
    ]


def second_turns(first: dict[str, Outcome]) -> list[Request]:
    """The conversations go on after the answers."""
    return [
        replace(turn, id=f"{turn.id}/2", prompt=(*turn.prompt, *first[turn.id].tokens, 8, 9))
        for turn in first_turns()
    ]


def conversation(harness: Harness, scheduler: Scheduler) -> dict[str, Outcome]:
    first = harness.run(first_turns(), scheduler=scheduler)
    return first | harness.run(second_turns(first), scheduler=scheduler)


def test_conversations_of_every_kind_are_equal_bit_for_bit(engine: Harness) -> None:
    plain = conversation(engine, engine.scheduler_with(CONFIG.num_pages))
    sharing = engine.scheduler_with(CONFIG.num_pages, SHARING)
    assert conversation(engine, sharing) == plain
    stats = sharing.stats()
    # The system prompt is computed once, and second turns find their answers' full pages.
    num_prompt = len(SYSTEM) + 2
    num_first = len(first_turns())
    first_hits = (num_first - 1) * (num_prompt - 1) // PAGE * PAGE
    assert stats.prefix_hit_tokens > first_hits + num_first * (num_prompt + PAGE)


def test_answers_are_equal_though_sequences_are_preempted_and_pages_evicted(
    engine: Harness,
) -> None:
    plain = conversation(engine, engine.scheduler_with(CONFIG.num_pages))
    crowded = engine.scheduler_with(18, SHARING)
    assert conversation(engine, crowded) == plain
    stats = crowded.stats()
    assert min(stats.num_preemptions, stats.prefix_evicted_pages, stats.prefix_hit_tokens) > 0


def test_a_prompt_that_is_known_whole_computes_its_last_token(engine: Harness) -> None:
    scheduler = engine.scheduler_with(CONFIG.num_pages, SHARING)
    prompts = [SYSTEM[: 2 * PAGE], SYSTEM[: 2 * PAGE + 1], SYSTEM[: 2 * PAGE - 1]]
    for index, prompt in enumerate(prompts * 2):
        asked = request("a", prompt, temperature=0.0)
        before = scheduler.stats().prefix_hit_tokens
        found = engine.run([asked], scheduler=scheduler)
        assert found["a"].tokens == engine.greedy(prompt, asked.sampling.max_tokens)
        hit = scheduler.stats().prefix_hit_tokens - before
        assert hit == (0 if index == 0 else (len(prompt) - 1) // PAGE * PAGE)


def test_logprobs_of_a_prompt_come_from_computing_it(engine: Harness) -> None:
    scheduler = engine.scheduler_with(CONFIG.num_pages, SHARING)
    asked = request("a", SYSTEM, prompt_logprobs=2)
    first = engine.run([asked], scheduler=scheduler)
    assert engine.run([asked], scheduler=scheduler) == first
    assert scheduler.stats().prefix_query_tokens == 0


def test_what_pages_held_before_changes_no_bit(engine: Harness) -> None:
    """NaN lies in free pages, and in every page that a hit does not bring."""
    plain = conversation(engine, engine.scheduler_with(CONFIG.num_pages))
    executor = engine.engine.executor
    state = executor._state
    poison = jax.tree.map(lambda pages: jnp.full_like(pages, jnp.nan).at[0].set(0), state.kv)
    executor._state = state._replace(kv=poison)
    try:
        scheduler = engine.scheduler_with(CONFIG.num_pages, SHARING)
        assert conversation(engine, scheduler) == plain
    finally:
        state = executor._state
        executor._state = state._replace(kv=jax.tree.map(jnp.zeros_like, state.kv))


def test_a_gateway_names_pages_as_the_engine_does(engine: Harness) -> None:
    cache = KVCache(single_group(PAGE), CONFIG.num_pages, SHARING)
    request = Request(id="a", prompt=SYSTEM, cache_salt="tenant:x")
    info = replace(engine.engine.info, weights=SHARING.weights, kv_dtype=SHARING.kv_dtype)
    names = page_digests(root_of(info, "tenant:x"), SYSTEM, info.page_size)
    assert list(cache.chain(request, []).digests(3)) == names


def test_elsewhere_pages_of_prompts_alone_are_shared(programs_folder) -> None:
    """XLA's loops round a decode step in another way than a prompt of the same tokens."""
    harness = Harness(TINY, CONFIG, backend=Backend.CPU, cache_folder=programs_folder)
    sharing = harness.scheduler_with(CONFIG.num_pages, replace(SHARING, generated=False))
    plain = conversation(harness, harness.scheduler_with(CONFIG.num_pages))
    assert conversation(harness, sharing) == plain
    most = 2 * len(first_turns()) * (len(SYSTEM) + 2)
    assert 0 < sharing.stats().prefix_hit_tokens <= most
