"""The cost of one hostile client to others: attacks beside good streams, against quiet times.

    python -m benchmarks.serving.hostile --url http://127.0.0.1:8000 --streams 4 --seconds 8

The victims are streams that follow each other, and a probe of `/health` every 20 ms. An attack runs
in a process of its own, so that only the server is slowed down by it. Before each attack the same
is measured without one. Prints one table and one JSON line; exits with 1 where an attack makes the
longest `/health` more than 50 ms longer, or doubles the victims' p99 of gaps between chunks.

The connections of a test are silent for as long as it takes: their time-outs have tests of their
own. Start the server with many descriptors (`ulimit -n`) and at least one slot more than streams.
"""

import argparse
import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx
import uvloop

from benchmarks.serving import failures, report

_HEALTH_EVERY_S = 0.02
_MOST_HEALTH_MS = 50.0  # more than in the quiet time before
_MOST_GAPS = 2.0  # times those of the quiet time before
_MIB = 1 << 20

Attack = Callable[[httpx.AsyncClient, str], Awaitable[None]]


async def _post(client: httpx.AsyncClient, path: str, body: bytes | dict[str, Any]) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"content-type": "application/json"}
    with contextlib.suppress(httpx.HTTPError):
        await client.post(path, content=content, headers=headers)


async def _empty_prompts(client: httpx.AsyncClient, model: str) -> None:
    """8 MB of empty prompts of ids."""
    head, tail = f'{{"model":"{model}","prompt":['.encode(), b"[]]}"
    count = (8 * _MIB - len(head) - len(tail) - 100) // 3
    await _post(client, "/v1/completions", head + b"[]," * count + tail)


async def _deep_json(client: httpx.AsyncClient, model: str) -> None:
    """8 MB of nested objects in a field that is not known."""
    del model
    body = b'{"x":' + b'{"a":[1],"b":{}},'.join([b"["] + [b""] * 400_000) + b"0]}"
    await _post(client, "/v1/completions", body[: 8 * _MIB])


async def _many_texts(client: httpx.AsyncClient, model: str) -> None:
    """256 prompts of 4,096 characters."""
    prompts = [f"{i:x} lorem ipsum dolor 1234 " * 160 for i in range(256)]
    body = {"model": model, "prompt": [text[:4096] for text in prompts], "max_tokens": 1}
    await _post(client, "/v1/completions", body)


async def _long_texts(client: httpx.AsyncClient, model: str) -> None:
    """Ten texts of 600 kB at once, which are too long."""
    texts = ["".join(f"{(i * 7919 + j) & 0xFFFF:04x}" for j in range(150_000)) for i in range(10)]
    bodies = ({"model": model, "prompt": text} for text in texts)
    await asyncio.gather(*(_post(client, "/v1/completions", body) for body in bodies))


async def _tokenize(client: httpx.AsyncClient, model: str) -> None:
    """A megabyte to tokenize, and as many ids to make text of."""
    await _post(client, "/tokenize", {"model": model, "prompt": "naïve 東京 data " * 60_000})
    await _post(client, "/detokenize", {"model": model, "tokens": list(range(2, 250)) * 4_000})


async def _masks(client: httpx.AsyncClient, model: str) -> None:
    """Most of the vocabulary allowed, for 128 choices."""
    body = {"model": model, "prompt": "x", "n": 128, "max_tokens": 4}
    await _post(client, "/v1/completions", body | {"allowed_token_ids": list(range(2, 500))})


async def _unread(client: httpx.AsyncClient, model: str) -> None:
    """128 choices with 20 alternatives a token, of which nothing is read."""
    body = {"model": model, "prompt": "x", "n": 128, "logprobs": 20, "max_tokens": 600}
    content = json.dumps(body | {"stream": True, "ignore_eos": True}).encode()
    headers = {"content-type": "application/json"}
    with contextlib.suppress(httpx.HTTPError):
        async with client.stream("POST", "/v1/completions", content=content, headers=headers):
            await asyncio.sleep(3)


async def _silent(client: httpx.AsyncClient, model: str) -> None:
    """500 connections: silent, with half a head, with half a body."""
    del model
    url = urlsplit(str(client.base_url))
    begun = [b"", b"GET /health HT", b"POST /v1/completions HTTP/1.1\r\nContent-Length: 9\r\n\r\n{"]

    async def hold(first: bytes) -> None:
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(5):
                reader, writer = await asyncio.open_connection(url.hostname, url.port)
                writer.write(first)
                await reader.read()

    await asyncio.gather(*(hold(begun[i % len(begun)]) for i in range(500)))


async def _chats(client: httpx.AsyncClient, model: str) -> None:
    """A conversation of 4,000 turns, six times at once."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": f"turn {i}"} for i in range(3_999)]
    body = {"model": model, "messages": turns, "max_tokens": 1}
    await asyncio.gather(*(_post(client, "/v1/chat/completions", body) for _ in range(6)))


ATTACKS: dict[str, Attack] = {
    "empty prompts, 8 MB": _empty_prompts,
    "nested JSON, 8 MB": _deep_json,
    "256 prompts of 4,096 characters": _many_texts,
    "10 texts of 600 kB": _long_texts,
    "tokenize, detokenize 1 MB": _tokenize,
    "masks of 500 ids, n = 128": _masks,
    "n = 128, logprobs, unread": _unread,
    "500 silent connections": _silent,
    "6 chats of 4,000 turns": _chats,
}


async def attack(name: str, url: str, model: str, seconds: float) -> None:
    """Repeats one attack until the time is over."""
    os.nice(10)  # a client has processors of its own
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while True:
                    await ATTACKS[name](client, model)


@dataclass
class Seen:
    """The waits and errors that victims saw in one stretch of time."""

    health_ms: list[float] = field(default_factory=list[float])
    gaps_ms: list[float] = field(default_factory=list[float])
    errors: list[str] = field(default_factory=list[str])

    @property
    def longest_health_ms(self) -> float:
        return max(self.health_ms, default=float("inf"))

    @property
    def p99_gap_ms(self) -> float:
        ordered = sorted(self.gaps_ms)
        return ordered[int(0.99 * (len(ordered) - 1))] if ordered else float("inf")


class Victims:
    """Good clients that never stop; what they see is filed under the present stretch."""

    def __init__(self, client: httpx.AsyncClient, model: str, streams: int) -> None:
        self._client = client
        self._model = model
        self._streams = streams
        self.seen = Seen()

    async def run(self) -> None:
        """Runs until it is cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._probe())
            for index in range(self._streams):
                group.create_task(self._read(index))

    async def _probe(self) -> None:
        while True:
            begun_s = time.perf_counter()
            seen = self.seen
            try:
                reply = await self._client.get("/health")
                if reply.status_code != 200:
                    seen.errors.append(f"/health: {reply.status_code}")
            except httpx.HTTPError as error:
                seen.errors.append(f"/health: {error!r}")
            seen.health_ms.append(1e3 * (time.perf_counter() - begun_s))
            await asyncio.sleep(_HEALTH_EVERY_S)

    async def _read(self, index: int) -> None:
        body = {"model": self._model, "prompt": f"victim {index}", "max_tokens": 200}
        body |= {"stream": True, "ignore_eos": True}
        while True:
            last_s: float | None = None
            try:
                async with self._client.stream("POST", "/v1/completions", json=body) as reply:
                    reply.raise_for_status()
                    async for _ in reply.aiter_bytes():
                        now_s = time.perf_counter()
                        if last_s is not None:
                            self.seen.gaps_ms.append(1e3 * (now_s - last_s))
                        last_s = now_s
            except httpx.HTTPError as error:
                self.seen.errors.append(f"stream: {error!r}")
                await asyncio.sleep(0.1)

    async def watch(self, seconds: float) -> Seen:
        """Collects what the victims see from now on, for `seconds`."""
        self.seen = Seen()
        await asyncio.sleep(seconds)
        return self.seen


def row_of(name: str, quiet: Seen, attacked: Seen) -> dict[str, Any]:
    """One row of the table; `passed` as the module says."""
    health_ms = attacked.longest_health_ms - quiet.longest_health_ms
    gaps = attacked.p99_gap_ms / quiet.p99_gap_ms
    return {
        "attack": name,
        "health_ms": [round(quiet.longest_health_ms, 1), round(attacked.longest_health_ms, 1)],
        "gap_p99_ms": [round(quiet.p99_gap_ms, 1), round(attacked.p99_gap_ms, 1)],
        "longest_gap_ms": round(max(attacked.gaps_ms, default=float("inf")), 1),
        "errors": attacked.errors[:3],
        "passed": health_ms <= _MOST_HEALTH_MS and gaps <= _MOST_GAPS and not attacked.errors,
    }


async def measure(url: str, streams: int, seconds: float, names: Sequence[str]) -> list[dict]:
    """Runs the attacks one after another. Raises BenchmarkError if there is no server."""
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        try:
            model = (await client.get("/v1/models")).json()["data"][0]["id"]
        except (httpx.HTTPError, ValueError, KeyError) as error:
            raise failures.BenchmarkError(f"no server answers at {url}: {error!r}") from None
        victims = Victims(client, model, streams)
        running = asyncio.create_task(victims.run())
        await asyncio.sleep(2)
        rows = []
        for name in names:
            quiet = await victims.watch(seconds)
            command = [sys.executable, "-m", "benchmarks.serving.hostile", "--url", url]
            command += ["--attack", name, "--model", model, "--seconds", str(seconds)]
            process = subprocess.Popen(command)
            attacked = await victims.watch(seconds + 1)
            while process.poll() is None:
                await asyncio.sleep(0.1)
            rows.append(row_of(name, quiet, attacked))
            await asyncio.sleep(2)  # what the attack left behind ends
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--streams", type=int, default=4, help="victims")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each quiet time and attack")
    parser.add_argument("--only", default="", help="attacks with this in their names")
    parser.add_argument("--attack", help=argparse.SUPPRESS)  # the attacker's own process
    parser.add_argument("--model", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        if arguments.attack:
            given = arguments.attack, arguments.url, arguments.model, arguments.seconds
            runner.run(attack(*given))
            return 0
        names = [name for name in ATTACKS if arguments.only in name]
        rows = runner.run(measure(arguments.url, arguments.streams, arguments.seconds, names))
    print(f"{'attack':34}{'/health ms':>18}{'gap p99 ms':>18}{'longest gap':>14}")
    for row in rows:
        quiet_and_attacked = (f"{a} → {b}" for a, b in (row["health_ms"], row["gap_p99_ms"]))
        cells = "".join(f"{cell:>18}" for cell in quiet_and_attacked)
        mark = "" if row["passed"] else "  ✗ " + "; ".join(row["errors"])
        print(f"{row['attack']:34}{cells}{row['longest_gap_ms']:>14}{mark}")
    config = {"streams": arguments.streams, "seconds": arguments.seconds}
    print(report.json_line("hostile", config, rows=rows))
    return 0 if all(row["passed"] for row in rows) else 1


if __name__ == "__main__":
    failures.run(main)
