"""The gateway's counters and the engine's statistics as Prometheus metrics.

Names are `jserve_…`, and vLLM's own names beside them for dashboards and routers that know those.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from jserve.core.stats import EngineStats, StatKind
from jserve.gateway.engine_client import EngineClient
from jserve.gateway.metrics import GatewayMetrics, Histogram

_Family = type[GaugeMetricFamily] | type[CounterMetricFamily]

_FAMILIES: Mapping[StatKind, _Family] = {
    StatKind.GAUGE: GaugeMetricFamily,
    StatKind.COUNTER: CounterMetricFamily,
}
_HISTOGRAMS: Mapping[str, str] = {
    "time_to_first_token_seconds": "From the start of a request to its first token.",
    "inter_token_latency_seconds": "Between two output tokens of a sequence.",
    "request_time_per_output_token_seconds": "Mean time per output token after the first.",
    "e2e_request_latency_seconds": "From the start of a request to its last token.",
    "request_queue_time_seconds": "Time a request waited for its first step.",
    "request_prompt_tokens": "Prompt tokens of a request.",
    "request_generation_tokens": "Output tokens of a sequence.",
}


class MetricsCollector(Collector):
    """Makes Prometheus families of `GatewayMetrics` and of the engine's statistics, at a scrape."""

    def __init__(
        self, metrics: GatewayMetrics, engine: EngineClient, model: Callable[[], str]
    ) -> None:
        self._metrics = metrics
        self._engine = engine
        self._model = model

    def collect(self) -> Iterable[Metric]:
        yield from self._engine_stats()
        yield from self._gauges()
        yield from self._counters()
        yield from self._histograms()
        yield from self._http()

    @property
    def _labels(self) -> dict[str, str]:
        return {"model_name": self._model(), "engine": "0"}

    def _engine_stats(self) -> Iterator[Metric]:
        stats = self._engine.stats
        for field in fields(EngineStats):
            family = _FAMILIES[field.metadata["kind"]]
            text, value = field.metadata["help"], getattr(stats, field.name)
            yield self._family(family, f"jserve_{field.metadata['metric']}", text, {}, value)
            if (vllm := field.metadata["vllm"]) is not None:
                yield self._family(family, f"vllm:{vllm}", text, {}, value)

    def _gauges(self) -> Iterator[Metric]:
        stats, info = self._engine.stats, self._engine.info
        used = 0.0 if info is None else 1.0 - stats.free_pages / max(info.num_pages, 1)
        for full in ("jserve_kv_cache_usage_perc", "vllm:kv_cache_usage_perc"):
            text = "Share of the KV pages in use, 0 to 1."
            yield self._family(GaugeMetricFamily, full, text, {}, used)
        open_text = "Open HTTP connections."
        own = (
            ("http_connections", open_text, self._metrics.connections.open),
            ("requests_in_flight", "Generations of this gateway.", self._metrics.in_flight),
            ("engine_ready", "Whether the engine takes requests.", float(self._engine.ready)),
            (
                "seconds_since_step",
                "Seconds for which the engine has had work and has ended no step.",
                self._metrics.seconds_since_step(),
            ),
        )
        for name, text, value in own:
            yield self._family(GaugeMetricFamily, f"jserve_{name}", text, {}, value)
        if info is not None:
            labels = {"block_size": str(info.page_size), "num_gpu_blocks": str(info.num_pages)}
            name, text = "vllm:cache_config_info", "KV cache: tokens of a page and pages."
            yield self._family(GaugeMetricFamily, name, text, labels, 1.0)

    def _counters(self) -> Iterator[Metric]:
        metrics = self._metrics
        shared = (
            ("prompt_tokens", "Prompt tokens of requests that started.", metrics.prompt_tokens),
            ("generation_tokens", "Output tokens.", metrics.generation_tokens),
        )
        for name, text, value in shared:
            for full in (f"jserve_{name}", f"vllm:{name}"):
                yield self._family(CounterMetricFamily, full, text, {}, value)
        ended = (
            ("refused", "HTTP connections above the limit.", metrics.connections.refused),
            ("timed_out", "HTTP connections of slow clients.", metrics.connections.timed_out),
        )
        for name, text, value in ended:
            full = f"jserve_http_connections_{name}"
            yield self._family(CounterMetricFamily, full, text, {}, value)
        for full in ("jserve_request_finished", "vllm:request_success"):
            text = "Sequences that ended, by reason."
            family = CounterMetricFamily(full, text, labels=[*self._labels, "finished_reason"])
            for reason, count in sorted(metrics.finished.items()):
                family.add_metric([*self._labels.values(), reason], count)
            yield family

        text = "Engine processes that had to be started again, by reason."
        restarts = CounterMetricFamily(
            "jserve_engine_restarts", text, labels=[*self._labels, "reason"]
        )
        for reason, count in sorted(metrics.engine_restarts.items()):
            restarts.add_metric([*self._labels.values(), reason], count)
        yield restarts

    def _family(
        self,
        kind: _Family,
        name: str,
        text: str,
        labels: dict[str, str],
        value: float,
    ) -> Metric:
        labels = self._labels | labels
        family = kind(name, text, labels=list(labels))
        family.add_metric(list(labels.values()), value)
        return family

    def _histograms(self) -> Iterator[Metric]:
        for name, text in _HISTOGRAMS.items():
            histogram: Histogram = getattr(self._metrics, name)
            for full in (f"jserve_{name}", f"vllm:{name}"):
                family = HistogramMetricFamily(full, text, labels=list(self._labels))
                values = list(self._labels.values())
                family.add_metric(values, histogram.buckets(), histogram.sum)
                yield family
        lag = self._metrics.event_loop_lag_seconds
        text = "Delay of the gateway's event loop, sampled 50 times a second."
        family = HistogramMetricFamily("jserve_event_loop_lag_seconds", text)
        family.add_metric([], lag.buckets(), lag.sum)
        yield family

    def _http(self) -> Iterator[Metric]:
        labels = ["handler", "method", "status"]
        requests = CounterMetricFamily("http_requests", "HTTP exchanges.", labels=labels)
        for values, count in self._metrics.http_requests.items():
            requests.add_metric(list(values), count)
        yield requests
        text = "Duration of HTTP exchanges, streams to their end."
        durations = HistogramMetricFamily("http_request_duration_seconds", text, labels=labels[:1])
        for values, histogram in self._metrics.http_duration_s.items():
            durations.add_metric(list(values), histogram.buckets(), histogram.sum)
        yield durations


def make_registry(
    metrics: GatewayMetrics, engine: EngineClient, model: Callable[[], str]
) -> CollectorRegistry:
    """A registry of its own (not the process-wide one) with all of the gateway's metrics.

    `model` gives the served name, which may be known only once the engine was reached.
    """
    registry = CollectorRegistry()
    registry.register(MetricsCollector(metrics, engine, model))
    ProcessCollector(registry=registry)
    return registry
