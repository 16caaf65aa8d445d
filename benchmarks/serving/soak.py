"""Many streams of mixed traffic with random cancels against a running server, for a given time.

    python benchmarks/serving/soak.py --url http://127.0.0.1:8000 --seconds 600 --pid <launcher>

Counts errors, looks for leaked slots and pages once all is quiet, and watches the memory of the
server's processes. Prints one table and one JSON line; exits with 1 when something is wrong.
"""

import argparse
import asyncio
import contextlib
import json
import random
import re
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil

_WORDS = (
    "the river town glass seven because quickly Zürich naïve 東京 data engine light under never "
    "music 3.14 for(i) question answer winter bridge copper slowly perhaps north"
).split()
_GAUGES = ("jserve_free_slots", "jserve_free_pages", "jserve_num_requests_running")
_HIT_TOKENS = "jserve_prefix_hit_tokens_total"
_COUNTERS = ("jserve_compiles_after_warmup_total", _HIT_TOKENS)


@dataclass
class Tally:
    """The counts of a run so far. Owned by the event loop."""

    outcomes: Counter[str] = field(default_factory=Counter[str])
    errors: list[str] = field(default_factory=list[str])
    chunks: int = 0
    ttft_s: list[float] = field(default_factory=list[float])
    memory_mib: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]])


def make_request(rng: random.Random, model: str, max_prompt_words: int) -> tuple[str, dict]:
    """A path and a body: chat or completion, short or long, greedy or sampled, plain or rich."""
    words = int(rng.choice([8, 30, 120, max_prompt_words]) * rng.uniform(0.5, 1.0)) + 1
    text = " ".join(rng.choices(_WORDS, k=words))
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": rng.choice([1, 8, 32, 64, 128]),
        "stream": rng.random() < 0.75,
        "temperature": rng.choice([0.0, 0.7, 1.0, 1.3]),
    }
    if rng.random() < 0.3:
        body |= {"top_p": 0.9, "seed": rng.randrange(1 << 31)}
    if rng.random() < 0.2:
        body |= {"presence_penalty": 0.5, "frequency_penalty": 0.2}
    if rng.random() < 0.2:
        body["stop"] = ["\n\n", "the end"]
    if rng.random() < 0.1:
        body["n"] = 2
    if rng.random() < 0.5:
        if rng.random() < 0.2:
            body |= {"logprobs": True, "top_logprobs": 3}
        return "/v1/chat/completions", body | {"messages": [{"role": "user", "content": text}]}
    if rng.random() < 0.2:
        body["logprobs"] = 2
    return "/v1/completions", body | {"prompt": text}


async def one_request(
    client: httpx.AsyncClient, rng: random.Random, model: str, words: int, tally: Tally
) -> None:
    """Sends one request, reads it to its end or drops the connection somewhere on the way."""
    path, body = make_request(rng, model, words)
    cancel_after_s = rng.expovariate(1 / 2.0) if rng.random() < 0.25 else None
    start_s = time.monotonic()
    try:
        async with asyncio.timeout(cancel_after_s), client.stream("POST", path, json=body) as reply:
            if reply.status_code != 200:
                detail = (await reply.aread()).decode()[:300]
                tally.outcomes[f"http {reply.status_code}"] += 1
                tally.errors.append(f"{path}: {reply.status_code} {detail}")
                return
            await _read(reply, bool(body["stream"]), start_s, tally)
            tally.outcomes["completed"] += 1
    except TimeoutError:
        tally.outcomes["cancelled"] += 1
    except (httpx.HTTPError, ValueError) as error:
        tally.outcomes[type(error).__name__] += 1
        tally.errors.append(f"{path}: {error!r}")


async def _read(reply: httpx.Response, streamed: bool, start_s: float, tally: Tally) -> None:
    """Raises ValueError when the answer is an error or has no proper end."""
    if not streamed:
        choices = json.loads(await reply.aread())["choices"]
        if any(choice["finish_reason"] not in ("stop", "length") for choice in choices):
            raise ValueError(f"finish reasons {[c['finish_reason'] for c in choices]}")
        return
    done, first_s = False, None
    async for line in reply.aiter_lines():
        if not line.startswith("data: "):
            continue
        tally.chunks += 1
        if first_s is None:
            first_s = time.monotonic() - start_s
        if line == "data: [DONE]":
            done = True
        elif "error" in (event := json.loads(line[6:])):
            raise ValueError(f"error event {event['error']}")
    if not done:
        raise ValueError("stream ended without [DONE]")
    if first_s is not None:
        tally.ttft_s.append(first_s)


async def gauges(client: httpx.AsyncClient) -> dict[str, float]:
    """Slots and pages that are free, and sequences that run."""
    text = (await client.get("/metrics")).text
    found = {}
    for name in (*_GAUGES, *_COUNTERS):
        match = re.search(rf"^{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
        found[name] = float(match.group(1)) if match else float("nan")
    return found


def memory_mib(pid: int | None) -> float:
    """Resident memory of a process and its children."""
    if pid is None:
        return 0.0
    process = psutil.Process(pid)
    family = [process, *process.children(recursive=True)]
    return sum(member.memory_info().rss for member in family) / 2**20


async def soak(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs the traffic and returns the report."""
    tally, rng = Tally(), random.Random(arguments.seed)
    limits = httpx.Limits(max_connections=arguments.streams * 2)
    async with httpx.AsyncClient(base_url=arguments.url, timeout=120, limits=limits) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]
        before = await gauges(client)
        start_s = time.monotonic()
        end_s = start_s + arguments.seconds

        async def stream(seed: int) -> None:
            own = random.Random(seed)
            while time.monotonic() < end_s:
                await one_request(client, own, model, arguments.max_prompt_words, tally)

        async def watch() -> None:
            while True:
                tally.memory_mib.append((time.monotonic() - start_s, memory_mib(arguments.pid)))
                await asyncio.sleep(arguments.seconds / 40)

        watcher = asyncio.create_task(watch())
        await asyncio.gather(*(stream(rng.randrange(1 << 31)) for _ in range(arguments.streams)))
        watcher.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watcher
        after = await _quiet(client, before)
        elapsed_s = time.monotonic() - start_s
    return _report(arguments, tally, before, after, elapsed_s)


async def _quiet(client: httpx.AsyncClient, before: dict[str, float]) -> dict[str, float]:
    """The gauges once they are back where they were, or what they are after 15 seconds."""
    after = await gauges(client)
    for _ in range(60):
        if all(after[name] == before[name] for name in _GAUGES):
            break
        await asyncio.sleep(0.25)
        after = await gauges(client)
    return after


def _report(
    arguments: argparse.Namespace,
    tally: Tally,
    before: dict[str, float],
    after: dict[str, float],
    elapsed_s: float,
) -> dict[str, Any]:
    warm = [mib for at_s, mib in tally.memory_mib if at_s > arguments.seconds * 0.25]
    half = max(len(warm) // 2, 1)
    return {
        "streams": arguments.streams,
        "seconds": round(elapsed_s, 1),
        "requests": sum(tally.outcomes.values()),
        "outcomes": dict(tally.outcomes),
        "errors": len(tally.errors),
        "first_errors": tally.errors[:5],
        "chunks": tally.chunks,
        "ttft_s_p50_p99": _percentiles(tally.ttft_s),
        "leaked_slots": before[_GAUGES[0]] - after[_GAUGES[0]],
        "leaked_pages": before[_GAUGES[1]] - after[_GAUGES[1]],
        "still_running": after[_GAUGES[2]],
        "compiles": after["jserve_compiles_after_warmup_total"],
        "cached_tokens": after[_HIT_TOKENS] - before[_HIT_TOKENS],
        "memory_mib_after_warm_up": round(sum(warm[:half]) / half) if warm else None,
        "memory_mib_at_end": round(sum(warm[half:]) / max(len(warm) - half, 1)) if warm else None,
    }


def _percentiles(values: list[float]) -> list[float]:
    ordered = sorted(values)
    return [round(ordered[int(q * (len(ordered) - 1))], 3) for q in (0.5, 0.99) if ordered]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--max_prompt_words", type=int, default=400)
    parser.add_argument("--pid", type=int, help="process id of the launcher, to watch its memory")
    parser.add_argument("--seed", type=int, default=0)
    report = asyncio.run(soak(parser.parse_args()))
    for name, value in report.items():
        print(f"{name:<26} {value}")
    print(json.dumps(report))
    leaked = report["leaked_slots"] or report["leaked_pages"] or report["still_running"]
    sys.exit(1 if report["errors"] or leaked else 0)


if __name__ == "__main__":
    main()
