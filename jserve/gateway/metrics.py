"""Counters of the gateway, for all front ends: requests, tokens, latencies, HTTP exchanges."""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field

from jserve.core.clock import Clock
from jserve.core.request import FinishReason
from jserve.gateway.output import GenerationRequest, OutputDelta

_LATENCY_S = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_TOKENS = tuple(float(step * 10**power) for power in range(6) for step in (1, 2, 5))

Labels = tuple[str, ...]


class Histogram:
    """Counts by upper bound. prometheus_client's own takes one value at a time, under a lock."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float, weight: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += weight
        self.sum += value * weight

    def buckets(self) -> list[tuple[str, float]]:
        """Pairs of (upper bound, count of values up to it), as Prometheus has them."""
        total = 0
        buckets: list[tuple[str, float]] = []
        for bound, count in zip((*self._bounds, float("inf")), self._counts, strict=True):
            total += count
            buckets.append(("+Inf" if bound == float("inf") else str(bound), total))
        return buckets


def _latency() -> Histogram:
    return Histogram(_LATENCY_S)


def _tokens() -> Histogram:
    return Histogram(_TOKENS)


@dataclass(slots=True)
class ConnectionCounts:
    """HTTP connections of one gateway process."""

    open: int = 0
    refused: int = 0  # above the limit
    timed_out: int = 0  # closed because the client kept the server waiting


@dataclass(slots=True, kw_only=True)
class GatewayMetrics:
    """Counters of one gateway process, for all front ends. Owned by its event loop."""

    clock: Clock
    prompt_tokens: int = 0
    generation_tokens: int = 0
    in_flight: int = 0  # generations that run
    # For which the engine has had work and has ended no step.
    seconds_since_step: Callable[[], float] = lambda: 0.0
    # Engine processes that had to be started again, by reason.
    engine_restarts: dict[str, int] = field(default_factory=lambda: {"crash": 0, "hang": 0})
    connections: ConnectionCounts = field(default_factory=ConnectionCounts)
    finished: dict[str, int] = field(default_factory=dict[str, int])  # by reason
    http_requests: dict[Labels, int] = field(default_factory=dict[Labels, int])
    http_duration_s: dict[Labels, Histogram] = field(default_factory=dict[Labels, Histogram])
    # Times start at `run`; each choice of a request counts.
    time_to_first_token_seconds: Histogram = field(default_factory=_latency)
    inter_token_latency_seconds: Histogram = field(default_factory=_latency)
    request_time_per_output_token_seconds: Histogram = field(default_factory=_latency)
    e2e_request_latency_seconds: Histogram = field(default_factory=_latency)
    request_queue_time_seconds: Histogram = field(default_factory=_latency)
    request_prompt_tokens: Histogram = field(default_factory=_tokens)
    request_generation_tokens: Histogram = field(default_factory=_tokens)
    # By how much the loop calls back too late; everybody waits that long.
    event_loop_lag_seconds: Histogram = field(default_factory=_latency)

    def start(self, generation: GenerationRequest) -> "RequestMetrics":
        """Counts a request that starts now; its output is for the caller to report."""
        return RequestMetrics(self, generation)

    def count_finish(self, reason: str) -> None:
        self.finished[reason] = self.finished.get(reason, 0) + 1

    def count_restart(self, reason: str) -> None:
        self.engine_restarts[reason] = self.engine_restarts.get(reason, 0) + 1

    def count_http(self, route: str, method: str, status: int, duration_s: float) -> None:
        key = (route, method, str(status))
        self.http_requests[key] = self.http_requests.get(key, 0) + 1
        self.http_duration_s.setdefault((route,), _latency()).add(duration_s)


@dataclass(slots=True)
class _ChoiceTimes:
    first_s: float
    last_s: float
    tokens: int = 0


class RequestMetrics:
    """Counts the output of one request. Owned by the stream that the output passes through."""

    def __init__(self, metrics: GatewayMetrics, generation: GenerationRequest) -> None:
        self._metrics = metrics
        self._num_prompt_tokens = len(generation.prompt.ids)
        self._start_s = metrics.clock.now_s()
        self._live: dict[int, _ChoiceTimes] = {}
        self._unfinished = generation.n
        self._open = True
        metrics.in_flight += 1

    def count(self, delta: OutputDelta) -> None:
        metrics, now_s, num = self._metrics, self._metrics.clock.now_s(), len(delta.token_ids)
        choice = self._live.get(delta.index)
        if choice is None:
            choice = self._live[delta.index] = _ChoiceTimes(now_s, now_s)
            self._count_first(delta, now_s)
        elif num:
            metrics.inter_token_latency_seconds.add((now_s - choice.last_s) / num, num)
            choice.last_s = now_s
        choice.tokens += num
        metrics.generation_tokens += num
        if delta.finish is not None:
            self._count_last(delta.finish, choice, now_s)

    def _count_first(self, delta: OutputDelta, now_s: float) -> None:
        metrics = self._metrics
        metrics.time_to_first_token_seconds.add(now_s - self._start_s)
        if delta.queue_s is not None:
            metrics.request_queue_time_seconds.add(delta.queue_s)
        if len(self._live) == 1:  # the prompt counts once
            metrics.prompt_tokens += self._num_prompt_tokens
            metrics.request_prompt_tokens.add(self._num_prompt_tokens)

    def _count_last(self, finish: FinishReason, choice: _ChoiceTimes, now_s: float) -> None:
        metrics = self._metrics
        self._unfinished -= 1
        metrics.count_finish(finish.value)
        metrics.e2e_request_latency_seconds.add(now_s - self._start_s)
        metrics.request_generation_tokens.add(choice.tokens)
        if choice.tokens > 1:
            per_token_s = (choice.last_s - choice.first_s) / (choice.tokens - 1)
            metrics.request_time_per_output_token_seconds.add(per_token_s)

    def end(self, reason: str) -> None:
        """Ends the request; `reason` is that of the choices without a finish. Idempotent."""
        if self._open:
            self._open = False
            self._metrics.in_flight -= 1
            for _ in range(self._unfinished):
                self._metrics.count_finish(reason)
