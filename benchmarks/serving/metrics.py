"""Records of requests → latencies, throughput and goodput. Pure.

Definitions, all as the client sees them:

- TTFT: from sending a request to its first chunk with text.
- chunk gap: between two chunks with text of one request. A chunk may carry several tokens.
- ITL: a chunk gap divided by the tokens of the later chunk, once for each of these tokens.
- TPOT: of one request, (last − first chunk with text) / (output tokens − 1).
- E2E: from sending a request to the end of its stream.
- goodput: requests that kept every limit, failed ones never; the ITL of a request is its own p99.

Tokens are those of `usage`; where a server does not tell, a chunk counts as one.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from benchmarks.serving.driver import Load
from benchmarks.serving.record import Record

PERCENTILES = (50, 90, 95, 99)
LATENCIES = ("ttft_ms", "itl_ms", "chunk_gap_ms", "tpot_ms", "e2e_ms")


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """Limits that a good request keeps; None is no limit."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    itl_ms: float | None = None

    @property
    def is_set(self) -> bool:
        """Whether there is any limit."""
        return any(limit is not None for limit in asdict(self).values())


@dataclass(slots=True)
class Samples:
    """Every latency of the complete requests, in milliseconds; ttft, tpot and e2e by request."""

    ttft_ms: list[float] = field(default_factory=list[float])
    itl_ms: list[float] = field(default_factory=list[float])
    chunk_gap_ms: list[float] = field(default_factory=list[float])
    tpot_ms: list[float] = field(default_factory=list[float])
    e2e_ms: list[float] = field(default_factory=list[float])


def itls_ms(record: Record) -> list[float]:
    """The time of each token after the first chunk."""
    times, counts = record.chunk_s, record.tokens_by_chunk()
    return [
        (times[i] - times[i - 1]) * 1e3 / counts[i]
        for i in range(1, len(times))
        for _ in range(counts[i])
    ]


def tpot_ms(record: Record) -> float | None:
    """Mean time per output token after the first; None for an answer of one token or chunk."""
    if record.tokens < 2 or len(record.chunk_s) < 2:
        return None
    return (record.chunk_s[-1] - record.chunk_s[0]) * 1e3 / (record.tokens - 1)


def samples_of(records: Sequence[Record]) -> Samples:
    """Latencies of the complete requests."""
    samples = Samples()
    for record in records:
        if record.error is not None:
            continue
        samples.ttft_ms.append((record.chunk_s[0] - record.sent_s) * 1e3)
        samples.itl_ms += itls_ms(record)
        samples.chunk_gap_ms += (np.diff(record.chunk_s) * 1e3).tolist()
        samples.e2e_ms.append((record.end_s - record.sent_s) * 1e3)
        tpot = tpot_ms(record)
        if tpot is not None:
            samples.tpot_ms.append(tpot)
    return samples


def is_good(record: Record, slo: Slo) -> bool:
    """Whether a request was answered within every limit."""
    if record.error is not None:
        return False
    if slo.ttft_ms is not None and (record.chunk_s[0] - record.sent_s) * 1e3 > slo.ttft_ms:
        return False
    tpot, itls = tpot_ms(record), itls_ms(record)
    if slo.tpot_ms is not None and tpot is not None and tpot > slo.tpot_ms:
        return False
    return not (slo.itl_ms is not None and itls and np.percentile(itls, 99) > slo.itl_ms)


def distribution(values: Sequence[float]) -> dict[str, float] | None:
    """Mean, percentiles (linearly interpolated) and maximum; None of nothing."""
    if not values:
        return None
    found = {f"p{q}": float(np.percentile(values, q)) for q in PERCENTILES}
    rounded = {"mean": float(np.mean(values)), **found, "max": max(values)}
    return {name: round(value, 3) for name, value in rounded.items()}


def _cached_tokens(records: Sequence[Record]) -> int | None:
    """Prompt tokens that the server did not compute; None if it does not tell."""
    told = [it.cached_tokens for it in records if it.cached_tokens is not None]
    return sum(told) if told else None


def summarize(load: Load, slo: Slo) -> dict[str, Any]:
    """Everything that is reported of a load, ready for JSON."""
    records, seconds = load.records, load.duration_s
    complete = [record for record in records if record.error is None]
    samples = samples_of(records)
    output = sum(record.tokens for record in complete)
    prompt = sum(record.prompt_tokens or 0 for record in complete)
    lags = [(r.sent_s - r.planned_s) * 1e3 for r in records if r.planned_s is not None and r.sent_s]
    errors = Counter(record.error[:160] for record in records if record.error is not None)
    return {
        "requests": len(records),
        "errors": len(records) - len(complete),
        "error_kinds": dict(errors.most_common(5)),
        "duration_s": round(seconds, 3),
        "requests_per_s": round(len(complete) / seconds, 3),
        "asked_tokens": [
            sum(r.asked_tokens[i] for r in complete if r.asked_tokens) for i in (0, 1)
        ],
        "prompt_tokens": prompt,
        "output_tokens": output,
        "cached_tokens": _cached_tokens(complete),
        "output_tokens_per_s": round(output / seconds, 2),
        "total_tokens_per_s": round((prompt + output) / seconds, 2),
        "chunks": sum(len(record.chunk_s) for record in complete),
        **{name: distribution(getattr(samples, name)) for name in LATENCIES},
        "goodput": _goodput(records, slo, seconds) if slo.is_set else None,
        "tokens_counted_by": _counted_by(complete),
        "tokens_of_chunks": _chunks_known(complete),
        "send_lag_ms": distribution(lags),
        "client_cpu_s": round(load.client_cpu_s, 3),
    }


def _goodput(records: Sequence[Record], slo: Slo, seconds: float) -> dict[str, Any]:
    good = sum(is_good(record, slo) for record in records)
    return {
        "slo": {name: limit for name, limit in asdict(slo).items() if limit is not None},
        "share": round(good / len(records), 4) if records else None,
        "requests_per_s": round(good / seconds, 3),
    }


def _counted_by(complete: Sequence[Record]) -> str | None:
    told = sum(record.output_tokens is not None for record in complete)
    if not complete:
        return None
    return "usage" if told == len(complete) else "chunks" if told == 0 else "usage or chunks"


def _chunks_known(complete: Sequence[Record]) -> str | None:
    if not complete:
        return None
    known = all(it.tells_chunks or len(it.chunk_s) == it.tokens for it in complete)
    return "known" if known else "estimated"
