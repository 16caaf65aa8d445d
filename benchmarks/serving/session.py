"""One visit to a server: check it, warm it up, put the loads on it one after another."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from benchmarks.serving import driver
from benchmarks.serving.driver import Load
from benchmarks.serving.failures import BenchmarkError
from benchmarks.serving.metrics import Slo, summarize
from benchmarks.serving.options import Point
from benchmarks.serving.record import Record
from benchmarks.serving.target import ServerInfo, Target
from benchmarks.serving.workload import Job


@dataclass(frozen=True, slots=True)
class Run:
    """A load and what came of it."""

    point: Point
    load: Load
    summary: dict[str, Any]


async def visit(
    target: Target,
    points: Sequence[Point],
    *,
    warm_up: Sequence[Job] = (),
    slo: Slo,
    name: str = "",
) -> tuple[ServerInfo, list[Run]]:
    """Runs all loads; raises BenchmarkError if the server is not fit for them."""
    try:
        info = await target.check()
        warmed = await driver.closed_loop(
            target, warm_up, streams=1, seconds=None, timeout_s=600, on_done=lambda record: None
        )
        for record in warmed.records:
            if record.error is not None:
                raise BenchmarkError(f"a request to warm up failed: {record.error}")
        runs: list[Run] = []
        for point in points:
            load = await _send(point, target, info, name)
            runs.append(Run(point, load, summarize(load, slo)))
        return info, runs
    finally:
        await target.close()


async def _send(point: Point, target: Target, info: ServerInfo, name: str) -> Load:
    label = f"{name} {point.label}".strip()
    failed = 0
    # Without a terminal there is no bar; with one it costs a line ten times a second.
    with tqdm(total=point.num_requests, desc=label, unit=" requests", disable=None) as bar:

        def on_done(record: Record) -> None:
            nonlocal failed
            if record.error is not None:
                failed += 1
                bar.set_postfix(errors=failed)
            bar.update()

        return await point.send(target, info, on_done)
