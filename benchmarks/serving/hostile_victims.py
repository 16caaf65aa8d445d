"""Good clients beside an attack: streams that follow each other, and a probe of `/health`."""

import asyncio
import re
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx

_HEALTH_EVERY_S = 0.02
_LAG_BUCKET = re.compile(r'jserve_event_loop_lag_seconds_bucket\{le="(.+?)"\} (\S+)')


@dataclass
class Seen:
    """The waits and errors that victims saw in one stretch of time."""

    health_ms: list[float] = field(default_factory=list[float])
    gaps_ms: list[float] = field(default_factory=list[float])
    first_ms: list[float] = field(default_factory=list[float])  # from a request to its first chunk
    errors: list[str] = field(default_factory=list[str])
    lag_ms: float = 0.0  # upper bound of the longest delay of the event loop, by its metric
    # Of the gateway's main thread, a share of the time: ready to run, but without a processor.
    waits: float = 0.0

    @property
    def longest_health_ms(self) -> float:
        return max(self.health_ms, default=float("inf"))

    @property
    def longest_gap_ms(self) -> float:
        return max(self.gaps_ms, default=float("inf"))

    @property
    def longest_first_ms(self) -> float:
        return max(self.first_ms, default=float("inf"))

    @property
    def p99_gap_ms(self) -> float:
        ordered = sorted(self.gaps_ms)
        return ordered[int(0.99 * (len(ordered) - 1))] if ordered else float("inf")


def longest_lag_ms(before: str, after: str) -> float:
    """Upper bound of the longest delay that the metrics page `after` has and `before` has not."""
    counts = dict(_LAG_BUCKET.findall(before))
    longest, below = 0.0, 0.0
    for bound, count in _LAG_BUCKET.findall(after):
        new = float(count) - float(counts.get(bound, 0))
        if new > below:
            longest, below = float(bound), new
    return 1e3 * longest


def _waited_s(pid: int | None) -> float:
    """Time that the main thread of a process has waited for a processor; 0 where it is unknown."""
    statistics = Path(f"/proc/{pid}/task/{pid}/schedstat")
    return 1e-9 * int(statistics.read_text().split()[1]) if statistics.exists() else 0.0


class Victims:
    """Good clients that never stop; what they see is filed under the present stretch."""

    def __init__(
        self, client: httpx.AsyncClient, model: str, streams: int, pid: int | None = None
    ) -> None:
        """`pid` is that of the gateway, if it is on this machine."""
        self._client = client
        self._model = model
        self._streams = streams
        self._pid = pid
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
        body = {"model": self._model, "prompt": f"victim {index}", "max_tokens": 60}
        body |= {"stream": True, "ignore_eos": True}
        while True:
            last_s: float | None = None
            begun_s = time.perf_counter()
            try:
                async with self._client.stream("POST", "/v1/completions", json=body) as reply:
                    reply.raise_for_status()
                    async for _ in reply.aiter_bytes():
                        now_s = time.perf_counter()
                        if last_s is None:
                            self.seen.first_ms.append(1e3 * (now_s - begun_s))
                        else:
                            self.seen.gaps_ms.append(1e3 * (now_s - last_s))
                        last_s = now_s
            except httpx.HTTPError as error:
                self.seen.errors.append(f"stream: {error!r}")
                await asyncio.sleep(0.1)

    async def watch(self, seconds: float) -> Seen:
        """Collects what the victims see from now on, for `seconds`."""
        before = (await self._client.get("/metrics")).text
        waited_s = _waited_s(self._pid)
        self.seen = Seen()
        await asyncio.sleep(seconds)
        seen, self.seen = self.seen, Seen()
        seen.waits = (_waited_s(self._pid) - waited_s) / seconds
        after = (await self._client.get("/metrics")).text
        seen.lag_ms = longest_lag_ms(before, after)
        return seen
