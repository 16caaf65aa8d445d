"""Throughput and latency of a running server at a given number of streams.

    python benchmarks/serving/load.py --streams 1 8 32 --prompt_tokens 128 --max_tokens 128

Every stream sends one request after another; token ids, so that lengths are exact. Prints one
table and one JSON line.
"""

import argparse
import asyncio
import json
import platform
import random
import subprocess
import time
from dataclasses import dataclass, field
from typing import Any

import httpx


@dataclass
class Samples:
    """Measured times in seconds, of the requests that ended inside the measured span."""

    ttft_s: list[float] = field(default_factory=list[float])
    gap_s: list[float] = field(default_factory=list[float])
    tokens: int = 0
    requests: int = 0


async def stream_one(client: httpx.AsyncClient, body: dict[str, Any], samples: Samples) -> None:
    """One streamed completion; every event's arrival is measured."""
    last_s = time.perf_counter()
    first = True
    async with client.stream("POST", "/v1/completions", json=body) as reply:
        reply.raise_for_status()
        async for line in reply.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if usage := event.get("usage"):
                samples.tokens += usage["completion_tokens"]
            if not event["choices"]:
                continue
            now_s = time.perf_counter()
            (samples.ttft_s if first else samples.gap_s).append(now_s - last_s)
            first, last_s = False, now_s
    samples.requests += 1


async def measure(arguments: argparse.Namespace, streams: int) -> dict[str, Any]:
    """Runs `streams` loops for the given seconds."""
    limits = httpx.Limits(max_connections=streams)
    async with httpx.AsyncClient(base_url=arguments.url, timeout=600, limits=limits) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        samples, rng = Samples(), random.Random(0)
        start_s = time.perf_counter()

        async def loop() -> None:
            while time.perf_counter() - start_s < arguments.seconds:
                prompt = [rng.randrange(100, 1000) for _ in range(arguments.prompt_tokens)]
                body = {
                    "model": model,
                    "prompt": prompt,
                    "max_tokens": arguments.max_tokens,
                    "temperature": 0,
                    "ignore_eos": True,
                    "stream": True,
                    "stream_options": {"include_usage": True},
                }
                await stream_one(client, body, samples)

        await asyncio.gather(*(loop() for _ in range(streams)))
        elapsed_s = time.perf_counter() - start_s
    return {
        "streams": streams,
        "requests": samples.requests,
        "output_tokens_per_s": round(samples.tokens / elapsed_s, 1),
        "ttft_ms_p50": _milliseconds(samples.ttft_s, 0.5),
        "ttft_ms_p99": _milliseconds(samples.ttft_s, 0.99),
        "event_gap_ms_p50": _milliseconds(samples.gap_s, 0.5),
        "event_gap_ms_p99": _milliseconds(samples.gap_s, 0.99),
    }


def _milliseconds(values: list[float], quantile: float) -> float | None:
    ordered = sorted(values)
    return round(ordered[int(quantile * (len(ordered) - 1))] * 1e3, 1) if ordered else None


def main() -> None:
    """Parses the arguments, prints the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--prompt_tokens", type=int, default=128)
    parser.add_argument("--max_tokens", type=int, default=128)
    arguments = parser.parse_args()
    rows = [asyncio.run(measure(arguments, streams)) for streams in arguments.streams]
    print("  ".join(f"{name:>19}" for name in rows[0]))
    for row in rows:
        print("  ".join(f"{value!s:>19}" for value in row.values()))
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    config = {key: value for key, value in vars(arguments).items() if key != "streams"}
    print(json.dumps({"commit": commit, "machine": platform.processor(), **config, "rows": rows}))


if __name__ == "__main__":
    main()
