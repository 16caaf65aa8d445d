"""The gateway's counters against prometheus_client's own, and their exposition read back."""

import asyncio
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client import Histogram as OtherHistogram
from prometheus_client.parser import text_string_to_metric_families

from jserve.core.clock import ManualClock
from jserve.core.errors import EngineError
from jserve.core.request import EngineInfo, FinishReason, Request, SamplingParams, SequenceUpdate
from jserve.core.stats import EngineStats
from jserve.gateway.engine_client import UpdateStream
from jserve.gateway.metrics import GatewayMetrics, Histogram
from jserve.gateway.prometheus import make_registry
from jserve.gateway.request_plane import GenerationRequest, OutputDelta, Prompt
from tests.gateway.fixtures import make_plane

INFO = EngineInfo(
    model="m",
    vocab=10,
    max_model_len=100,
    num_slots=4,
    num_pages=10,
    page_size=16,
    max_queue=5,
    eos_token_ids=(),
)


class Engine:
    info = INFO
    ready = True
    stats = EngineStats(num_waiting=3, num_running=2, free_slots=2, free_pages=4, num_preemptions=7)


def generation(n: int = 1) -> GenerationRequest:
    return GenerationRequest(id="g", prompt=Prompt((1, 2, 3)), sampling=SamplingParams(), n=n)


def samples(
    metrics: GatewayMetrics, engine: Engine | None = None
) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    registry = make_registry(metrics, cast(Any, engine or Engine()), lambda: "name")
    text = generate_latest(registry).decode()
    found: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = dict(sample.labels)
            if "model_name" in labels:
                assert labels.pop("model_name") == "name"
                labels.pop("engine")
            found[sample.name, tuple(sorted(labels.items()))] = sample.value
    return found


@given(st.lists(st.tuples(st.floats(0, 20), st.integers(1, 5))))
def test_histogram_counts_as_prometheus_does(values: list[tuple[float, int]]) -> None:
    bounds = (0.5, 1.0, 2.5, 10.0)
    mine = Histogram(bounds)
    registry = CollectorRegistry()
    other = OtherHistogram("h", "h", buckets=bounds, registry=registry)
    for value, weight in values:
        mine.add(value, weight)
        for _ in range(weight):
            other.observe(value)
    for bound, count in mine.buckets():
        assert registry.get_sample_value("h_bucket", {"le": bound}) == count
    assert mine.sum == pytest.approx(registry.get_sample_value("h_sum"))


def test_a_request_is_timed() -> None:
    clock = ManualClock()
    metrics = GatewayMetrics(clock=clock)
    request = metrics.start(generation())
    for wait_s, delta in (
        (2.0, OutputDelta(0, "a", (1,), queue_s=0.5)),
        (0.3, OutputDelta(0, "bcd", (1, 2, 3))),
        (0.2, OutputDelta(0, "e", (1, 2), finish=FinishReason.LENGTH)),
    ):
        assert metrics.in_flight == 1
        clock.advance(wait_s)
        request.count(delta)
    request.end("abort")  # nothing is left to be aborted
    assert metrics.in_flight == 0
    found = samples(metrics)
    for prefix in ("jserve_", "vllm:"):
        expected = {
            "time_to_first_token_seconds_sum": 2.0,
            "inter_token_latency_seconds_sum": 0.5,
            "inter_token_latency_seconds_count": 5.0,
            "request_time_per_output_token_seconds_sum": 0.1,
            "e2e_request_latency_seconds_sum": 2.5,
            "request_queue_time_seconds_sum": 0.5,
            "request_prompt_tokens_sum": 3.0,
            "request_generation_tokens_sum": 6.0,
            "prompt_tokens_total": 3.0,
            "generation_tokens_total": 6.0,
            "num_requests_running": 2.0,
            "num_requests_waiting": 3.0,
            "kv_cache_usage_perc": 0.6,
            "num_preemptions_total": 7.0,
        }
        got = {name: found[prefix + name, ()] for name in expected}
        assert got == pytest.approx(expected)
    by_length = (("finished_reason", "length"),)
    assert found["vllm:request_success_total", by_length] == 1
    info = (("block_size", "16"), ("num_gpu_blocks", "10"))
    assert found["vllm:cache_config_info", info] == 1


def test_every_engine_statistic_is_exposed_with_its_value_and_help() -> None:
    stats = EngineStats(**{field.name: 100 + i for i, field in enumerate(fields(EngineStats))})
    engine = Engine()
    engine.stats = stats
    registry = make_registry(GatewayMetrics(clock=ManualClock()), cast(Any, engine), lambda: "name")
    text = generate_latest(registry).decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    seen = set()
    for family in families.values():
        if family.name.startswith("jserve_") and family.samples:
            seen.add((family.samples[0].value, family.type, family.documentation))
    for field in fields(EngineStats):
        kind, text = field.metadata["kind"].value, field.metadata["help"]
        assert (getattr(stats, field.name), kind, text) in seen, field.name
        assert text.endswith(".")


def test_the_prefix_cache_is_counted_under_these_names_and_vllms() -> None:
    engine = Engine()
    engine.stats = EngineStats(
        cached_pages=5, prefix_query_tokens=80, prefix_hit_tokens=48, prefix_evicted_pages=2
    )
    found = samples(GatewayMetrics(clock=ManualClock()), engine)
    expected = {
        "jserve_prefix_query_tokens_total": 80,
        "jserve_prefix_hit_tokens_total": 48,
        "jserve_prefix_evicted_pages_total": 2,
        "jserve_cached_pages": 5,
        "vllm:prefix_cache_queries_total": 80,
        "vllm:prefix_cache_hits_total": 48,
    }
    assert {name: found[name, ()] for name in expected} == expected


def test_choices_of_a_prompt_count_it_once() -> None:
    clock = ManualClock()
    metrics = GatewayMetrics(clock=clock)
    request = metrics.start(generation(n=2))
    for index in range(2):
        clock.advance(1.0)
        request.count(OutputDelta(index, "a", (1,), finish=FinishReason.STOP))
    assert (metrics.prompt_tokens, metrics.generation_tokens) == (3, 2)
    assert metrics.finished == {"stop": 2}


class OneOfThree:
    """An engine that finishes one choice and then fails, or never answers again."""

    info = INFO
    ready = True
    stats = EngineStats()

    def __init__(self, error: EngineError | None) -> None:
        self._error = error

    def submit(self, requests: Sequence[Request]) -> UpdateStream:
        stream = UpdateStream(self, [request.id for request in requests])
        stream.post(SequenceUpdate(requests[0].id, (1,), FinishReason.STOP))
        if self._error is not None:
            stream.fail(self._error)
        return stream

    def abort(self, request_id: str) -> None:
        pass


@pytest.mark.parametrize(("fails", "reason"), [(False, "abort"), (True, "error")])
def test_unfinished_choices_count_once(fails: bool, reason: str) -> None:
    metrics = GatewayMetrics(clock=ManualClock())
    # Made here: a parameter lives as long as pytest, and the frames of its traceback with it.
    error = EngineError("x") if fails else None

    async def main() -> None:
        deltas = make_plane(OneOfThree(error)).run(generation(n=3), metrics)
        await deltas.__anext__()
        assert metrics.in_flight == 1
        if error is not None:
            with pytest.raises(EngineError):
                await deltas.__anext__()
        await deltas.aclose()
        deltas.close()

    asyncio.run(main())
    assert metrics.in_flight == 0
    assert metrics.finished == {"stop": 1, reason: 2}


def test_http_exchanges() -> None:
    metrics = GatewayMetrics(clock=ManualClock())
    metrics.count_http("/v1/models", "GET", 200, 0.25)
    metrics.count_http("/v1/models", "GET", 200, 0.5)
    metrics.count_http("/v1/models", "GET", 404, 0.25)
    found = samples(metrics)
    labels = (("handler", "/v1/models"), ("method", "GET"), ("status", "200"))
    assert found["http_requests_total", labels] == 2
    assert found["http_request_duration_seconds_sum", labels[:1]] == 1.0
