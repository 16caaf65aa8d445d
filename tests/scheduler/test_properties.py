"""The scheduler under random load: 10⁵ operations against a simulated device that checks plans."""

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jserve.cache.kv_cache import KVCache, PrefixSharing
from jserve.cache.layout import single_group
from jserve.core.step import MoveKind, Program, ProgramKind
from jserve.scheduler.config import SchedulerConfig
from tests.scheduler.drill import Drill, Engine, engines
from tests.scheduler.sharing_cache import SharingCache
from tests.scheduler.swapping_cache import SwappingCache


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(engine=engines(), seed=st.integers(0, 1 << 32), depth=st.sampled_from((1, 2, 2, 3)))
def test_random_load_loses_nothing(engine: Engine, seed: int, depth: int) -> None:
    Drill(engine, seed, depth).run(500)


@pytest.mark.sweep
@settings(
    max_examples=220, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(engine=engines(), seed=st.integers(0, 1 << 32), depth=st.sampled_from((1, 2, 2, 3)))
def test_100_000_orders(engine: Engine, seed: int, depth: int) -> None:
    Drill(engine, seed, depth).run(500)


def sharing(engine: Engine, seed: int) -> SharingCache:
    return SharingCache(engine.page_size, engine.num_pages, seed)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(engine=engines(), seed=st.integers(0, 1 << 32), depth=st.sampled_from((1, 2, 3)))
def test_random_load_with_shared_cached_and_copied_pages(
    engine: Engine, seed: int, depth: int
) -> None:
    Drill(engine, seed, depth, sharing(engine, seed)).run(500)


@pytest.mark.sweep
@settings(
    max_examples=220, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(engine=engines(), seed=st.integers(0, 1 << 32), depth=st.sampled_from((1, 2, 3)))
def test_100_000_orders_with_shared_cached_and_copied_pages(
    engine: Engine, seed: int, depth: int
) -> None:
    Drill(engine, seed, depth, sharing(engine, seed)).run(500)


def prefixes(engine: Engine) -> KVCache:
    sharing = PrefixSharing(compare_tokens=True)
    return KVCache(single_group(engine.page_size), engine.num_pages, sharing)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(engine=engines(), seed=st.integers(0, 1 << 32), depth=st.sampled_from((1, 2, 3)))
def test_random_load_with_prefixes(engine: Engine, seed: int, depth: int) -> None:
    Drill(engine, seed, depth, prefixes(engine)).run(500)


@pytest.mark.sweep
@settings(
    max_examples=2200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(engine=engines(), seed=st.integers(0, 1 << 32), depth=st.sampled_from((1, 2, 3)))
def test_1_000_000_orders_with_prefixes(engine: Engine, seed: int, depth: int) -> None:
    Drill(engine, seed, depth, prefixes(engine)).run(500)


def swapping(engine: Engine, seed: int) -> SwappingCache:
    """Host memory for a part of what leaves the device, or for more than it."""
    num_host_pages = 1 + seed % (2 * engine.num_pages)
    return SwappingCache(engine.page_size, engine.num_pages, num_host_pages, seed)


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(engine=engines(), seed=st.integers(0, 1 << 32), depth=st.sampled_from((1, 2, 3)))
def test_random_load_with_pages_that_leave_and_come_back(
    engine: Engine, seed: int, depth: int
) -> None:
    Drill(engine, seed, depth, swapping(engine, seed)).run(500)


@pytest.mark.sweep
@settings(
    max_examples=220, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(engine=engines(), seed=st.integers(0, 1 << 32), depth=st.sampled_from((1, 2, 3)))
def test_100_000_orders_with_pages_that_leave_and_come_back(
    engine: Engine, seed: int, depth: int
) -> None:
    Drill(engine, seed, depth, swapping(engine, seed)).run(500)


@settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(engine=engines(), seed=st.integers(0, 1 << 32))
def test_same_input_gives_the_same_plans(engine: Engine, seed: int) -> None:
    first, second = Drill(engine, seed), Drill(engine, seed)
    first.run(200)
    second.run(200)
    assert first.plans == second.plans


CROWDED = Engine(
    num_slots=4,
    num_pages=16,
    page_size=2,
    max_model_len=32,
    programs=(Program(ProgramKind.MIXED, 8, 4), Program(ProgramKind.DECODE, 4, 4, 4)),
    max_processor_rows=1,
    config=SchedulerConfig(max_queue=8),
)


@pytest.mark.parametrize("seed", range(3))
def test_the_drill_reaches_preemption_and_decode_runs(seed: int) -> None:
    """The random load above would prove little if it never came to these."""
    drill = Drill(CROWDED, seed)
    drill.run(2000)
    admissions = [admission for plan in drill.plans for admission in plan.admissions]
    assert drill.scheduler.stats().num_preemptions > 20
    assert drill.num_in_flight_preemptions > 10
    assert sum(bool(admission.output) for admission in admissions) > 10
    assert any(plan.num_steps == 4 for plan in drill.plans)
    assert drill.num_done > 100


@pytest.mark.parametrize("seed", range(3))
def test_the_drill_reaches_every_kind_of_hit(seed: int) -> None:
    engine = replace(CROWDED, num_pages=24)
    drill = Drill(engine, seed, cache=sharing(engine, seed))
    drill.run(2000)
    assert isinstance(drill.cache, SharingCache)
    seen = drill.cache.seen
    assert min(seen[event] for event in ("hit", "shared", "copied", "evicted")) > 10
    assert drill.scheduler.stats().num_preemptions > 20
    admissions = [admission for plan in drill.plans for admission in plan.admissions]
    assert sum(admission.num_computed > 0 for admission in admissions) == seen["hit"]
    assert sum(len(plan.moves) for plan in drill.plans) == seen["copied"]
    assert any(admission.history_rows for admission in admissions)
    assert drill.num_done > 100


@pytest.mark.parametrize(("seed", "page_size"), [(0, 2), (1, 2), (2, 1)])
def test_the_drill_reaches_what_prefixes_bring(seed: int, page_size: int) -> None:
    engine = replace(CROWDED, page_size=page_size, num_pages=48 // page_size)
    drill = Drill(engine, seed, cache=prefixes(engine))
    drill.weights = [5, 1, 3, 3]
    drill.run(3000)
    stats = drill.scheduler.stats()
    assert min(stats.num_preemptions, stats.prefix_evicted_pages) > 20
    assert drill.num_overtaken > 0
    assert 0 < stats.prefix_hit_tokens < stats.prefix_query_tokens
    admissions = [admission for plan in drill.plans for admission in plan.admissions]
    hits = [admission for admission in admissions if admission.num_computed]
    assert any(a.num_computed > len(a.request.prompt) for a in hits), "no hit on generated tokens"
    if page_size == 1:  # what a preempted sequence has computed is found to its last token
        assert sum(a.last_token is not None for a in hits) > 1
    assert any(a.history_rows for a in hits)
    assert drill.num_done > 100


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_drill_reaches_pages_that_leave_at_every_moment(depth: int) -> None:
    engine = replace(CROWDED, num_pages=24)
    cache = SwappingCache(engine.page_size, engine.num_pages, num_host_pages=40, seed=depth)
    drill = Drill(engine, depth, depth, cache)
    drill.weights = [5, 1.5, 3, 3]
    drill.run(3000)
    seen = cache.seen
    assert min(seen[event] for event in ("out", "in", "forgotten")) > 50
    assert min(seen["inside"], drill.num_leaving_aborts) > 5
    assert drill.scheduler.stats().num_preemptions > 20
    assert drill.num_done > 100
    if depth > 1:  # else a step has landed before the next is planned
        assert seen["not landed"] > 10
        assert drill.num_in_flight_preemptions > 10
    moves = Counter(move.kind for plan in drill.plans for move in plan.moves)
    assert min(moves[MoveKind.OUT], moves[MoveKind.IN]) > 100
