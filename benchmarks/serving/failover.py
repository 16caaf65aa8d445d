"""Kills the engine again and again under load: every answer must be that of an engine that lived.

    python -m benchmarks.serving.failover --kills 50

Starts a server with one engine, asks every kind of request undisturbed (greedy, seeded, penalties,
several choices, stop strings, log-probabilities, with `--grammars` also bound answers; streamed and
not), then asks them in a loop over
`--streams` connections while the engine is killed (SIGKILL, or whatever `--signal` names) at random
moments. Crashes do not count as crashes in a row (control.healthy_after_s=0), which would put the
restarts off. Prints how many answers differ, and the time from the last token before a death to the
first after it, of each stream that was under way. Exits with 1 when an answer differs or is an
error.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil

from benchmarks.serving import failures, report
from benchmarks.serving.failures import BenchmarkError
from benchmarks.serving.servers import ServerProcess, free_port
from jserve.engine.job import COMMAND

_START_TIMEOUT_S = 600.0
_POLL_S = 0.02
_PROMPTS = ("Once upon a time", "The river of glass", "def main():", "Seven towns, one bridge")
_PENALTIES = {"presence_penalty": 0.5, "frequency_penalty": 0.3, "repetition_penalty": 1.2}
_KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "seeded": {"temperature": 1.0, "top_p": 0.9},
    "penalties": {"temperature": 0.9, **_PENALTIES},
    "n=2": {"temperature": 1.0, "n": 2},
    "stop": {"temperature": 1.0, "stop": ["e", "xj"], "min_tokens": 20},
    "logprobs": {"temperature": 1.0, "logprobs": 3},
}
_SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "integer"}}}
_GRAMMARS: dict[str, dict[str, Any]] = {  # for models with an end-of-sequence id
    "json": {"temperature": 1.0, "guided_json": _SCHEMA | {"required": ["a", "b"]}},
    "regex": {"temperature": 0, "guided_regex": "([a-z]{2,9} ){20,}"},
}

Answer = list[tuple[str, str | None, str]]  # of each choice: text, finish reason, log-probabilities


@dataclass(frozen=True, slots=True)
class Ask:
    """One request, and whether it is streamed."""

    kind: str
    body: dict[str, Any]
    stream: bool


@dataclass(slots=True)
class Tally:
    """The counts of a run so far. Owned by the event loop."""

    expected: dict[int, Answer] = field(default_factory=dict[int, Answer])
    answers: int = 0
    interrupted: int = 0  # answers during which the engine was killed
    put_off: int = 0  # requests refused with 503, and sent again
    wrong: list[str] = field(default_factory=list[str])
    killed_s: list[float] = field(default_factory=list[float])
    ready_s: list[float] = field(default_factory=list[float])  # from each death to the next /ready
    gaps_s: list[float] = field(default_factory=list[float])  # last token to next token
    done: asyncio.Event = field(default_factory=asyncio.Event)


def make_asks(count: int, max_tokens: int, seed: int, *, grammars: bool = False) -> list[Ask]:
    """The requests: every kind over several prompts, every second one streamed."""
    rng = random.Random(seed)
    kinds = _KINDS | _GRAMMARS if grammars else _KINDS
    asks: list[Ask] = []
    for number in range(count):
        kind = list(kinds)[number % len(kinds)]
        body = {
            "prompt": rng.choice(_PROMPTS) * rng.randint(1, 6),
            "max_tokens": rng.randint(max_tokens // 4, max_tokens),
            "seed": rng.randrange(1 << 31),
            "ignore_eos": kind not in _GRAMMARS,
        }
        stream = number // len(kinds) % 2 == 0
        asks.append(Ask(kind, body | kinds[kind] | {"stream": stream}, stream))
    return asks


async def answer_of(client: httpx.AsyncClient, ask: Ask, tally: Tally) -> Answer:
    """The answer to `ask`, sent again while it is refused. Raises BenchmarkError."""
    while True:
        async with client.stream("POST", "/v1/completions", json=ask.body) as reply:
            if reply.status_code == 503 and reply.headers.get("retry-after"):
                tally.put_off += 1
            elif reply.status_code != 200:
                raise BenchmarkError(f"HTTP {reply.status_code}: {(await reply.aread())[:200]!r}")
            elif ask.stream:
                return await _streamed(reply, tally)
            else:
                return _joined(json.loads(await reply.aread())["choices"])
        await asyncio.sleep(0.1)


async def _streamed(reply: httpx.Response, tally: Tally) -> Answer:
    choices: list[dict[str, Any]] = []
    came_s: list[float] = []
    async for line in reply.aiter_lines():
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        event = json.loads(line[6:])
        if "error" in event:
            raise BenchmarkError(f"in the stream: {event['error']['message']}")
        choices += event["choices"]
        came_s.append(time.monotonic())
    tally.gaps_s += gaps_s(came_s, tally.killed_s)
    return _joined(choices)


def gaps_s(came_s: list[float], killed_s: list[float]) -> list[float]:
    """The outage of each death that a stream lived through, as its reader saw it.

    Tokens that were on their way still come, so it is the longest pause until the next death.
    """
    found_s: list[float] = []
    for death_s, next_s in zip(killed_s, [*killed_s[1:], float("inf")], strict=False):
        if came_s and came_s[0] < death_s < came_s[-1]:
            pairs = itertools.pairwise(came_s)
            found_s.append(max(b - a for a, b in pairs if b > death_s and a < next_s))
    return found_s


def _joined(choices: list[dict[str, Any]]) -> Answer:
    """Puts the parts of each choice together."""
    texts: dict[int, str] = {}
    finishes: dict[int, str | None] = {}
    scores: dict[int, list[Any]] = {}
    for part in choices:
        index = part["index"]
        texts[index] = texts.get(index, "") + part["text"]
        finishes[index] = part["finish_reason"]
        if logprobs := part.get("logprobs"):
            numbers = (round(value, 4) for value in logprobs["token_logprobs"])
            scores.setdefault(index, []).extend(zip(logprobs["tokens"], numbers, strict=True))
    return [(texts[i], finishes[i], json.dumps(scores.get(i, []))) for i in sorted(texts)]


async def work(client: httpx.AsyncClient, asks: Iterator[tuple[int, Ask]], tally: Tally) -> None:
    """Asks one request after the other until all kills are done."""
    for number, ask in asks:
        if tally.done.is_set():
            return
        before = len(tally.killed_s)
        try:
            found = await answer_of(client, ask, tally)
        except (BenchmarkError, httpx.TransportError) as error:
            tally.wrong.append(f"{ask.kind}, stream={ask.stream}: {error!r}")
            continue
        tally.answers += 1
        tally.interrupted += len(tally.killed_s) > before
        if found != tally.expected[number]:
            tally.wrong.append(
                f"{ask.kind}, stream={ask.stream}: {found!r} is not {tally.expected[number]!r}"
            )


async def kill(
    client: httpx.AsyncClient, launcher: int, options: argparse.Namespace, tally: Tally
) -> None:
    """Kills the engine so many times, at random moments after it is ready."""
    rng = random.Random(options.seed)
    number = signal.Signals[options.signal]
    try:
        for count in range(options.kills):
            await asyncio.sleep(rng.uniform(options.min_life_s, options.max_life_s))
            (engine,) = engines(launcher)
            tally.killed_s.append(time.monotonic())
            engine.send_signal(number)
            await asyncio.to_thread(engine.wait, 120)
            while [child.pid for child in engines(launcher)] in ([], [engine.pid]):
                await asyncio.sleep(_POLL_S)
            await until_ready(client)
            tally.ready_s.append(time.monotonic() - tally.killed_s[-1])
            print(f"\r{count + 1} kills, {tally.answers} answers", end="", file=sys.stderr)
    finally:
        tally.done.set()


def engines(launcher: int) -> list[psutil.Process]:
    """Children of the launcher that are engines; others render templates and read bodies."""
    found: list[psutil.Process] = []
    for child in psutil.Process(launcher).children():
        with contextlib.suppress(psutil.Error):
            if COMMAND[-1] in child.cmdline():
                found.append(child)
    return found


async def until_ready(client: httpx.AsyncClient) -> None:
    """Returns once a request would be answered."""
    async with asyncio.timeout(_START_TIMEOUT_S):
        while True:
            with contextlib.suppress(httpx.TransportError):
                if (await client.get("/ready")).status_code == 200:
                    return
            await asyncio.sleep(_POLL_S)


async def measure(options: argparse.Namespace, url: str, server: ServerProcess) -> Tally:
    """Undisturbed answers first, then those under fire."""
    tally = Tally()
    asks = list(
        enumerate(
            make_asks(options.requests, options.max_tokens, options.seed, grammars=options.grammars)
        )
    )
    limits = httpx.Limits(max_connections=options.streams + 8)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
        waiting = asyncio.create_task(until_ready(client))
        while not waiting.done():
            server.check_alive()
            await asyncio.sleep(_POLL_S)
        waiting.result()
        slots = asyncio.Semaphore(options.streams)

        async def undisturbed(number: int, ask: Ask) -> None:
            async with slots:
                tally.expected[number] = await answer_of(client, ask, tally)

        await asyncio.gather(*(undisturbed(number, ask) for number, ask in asks))

        def endless() -> Iterator[tuple[int, Ask]]:
            while True:
                yield from asks

        source = endless()
        async with asyncio.TaskGroup() as tasks:
            for _ in range(options.streams):
                tasks.create_task(work(client, source, tally))
            tasks.create_task(kill(client, server.pid, options, tally))
    return tally


def _percentiles(seconds: list[float]) -> dict[str, float] | None:
    if not seconds:
        return None
    found = np.percentile(seconds, (50, 90, 99, 100))
    names = ("p50", "p90", "p99", "max")
    return {name: round(float(value), 3) for name, value in zip(names, found, strict=True)}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--config", default="configs/tiny_random.py")
    parser.add_argument("--grammars", action="store_true", help="needs a model that can end")
    parser.add_argument("--set", action="append", default=[], help="as of jserve; may repeat")
    parser.add_argument("--streams", type=int, default=12, help="requests at a time")
    parser.add_argument("--requests", type=int, default=48, help="different ones")
    parser.add_argument("--max_tokens", type=int, default=400)
    parser.add_argument("--signal", default="SIGKILL", help="SIGKILL, SIGSEGV, SIGABRT, …")
    parser.add_argument("--min_life_s", type=float, default=0.2, help="of an engine once ready")
    parser.add_argument("--max_life_s", type=float, default=1.5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    http, grpc = free_port(), free_port()
    log = Path(tempfile.mkdtemp(prefix="failover-")) / "server.log"
    command = [
        *(sys.executable, "-m", "jserve", f"--config={options.config}"),
        *(f"--http_port={http}", f"--grpc_port={grpc}"),
        *(f"--set={assignment}" for assignment in ("control.healthy_after_s=0", *options.set)),
    ]
    with ServerProcess("jserve", command, log) as server:
        tally = asyncio.run(measure(options, f"http://127.0.0.1:{http}", server))
    gaps, ready = _percentiles(tally.gaps_s), _percentiles(tally.ready_s)
    counts = {
        "kills": len(tally.killed_s),
        "answers": tally.answers,
        "of them interrupted": tally.interrupted,
        "put off (503)": tally.put_off,
        "wrong": len(tally.wrong),
    }
    rows = [[name, str(value)] for name, value in counts.items()]
    for name, found in (("last token to next s", gaps), ("death to /ready s", ready)):
        rows += [[f"{name} {key}", report.number(value)] for key, value in (found or {}).items()]
    print()
    print(report.grid(["", ""], rows))
    for line in tally.wrong[:5]:
        print(f"wrong: {line[:600]}")
    print(report.json_line("failover", vars(options), counts=counts, gap_s=gaps, ready_s=ready))
    return 1 if tally.wrong or not tally.answers else 0


if __name__ == "__main__":
    failures.run(main)
