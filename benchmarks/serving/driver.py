"""Sends a load: at given times whatever the server does, or on a number of streams at once."""

import asyncio
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.serving.failures import RequestFailed
from benchmarks.serving.record import Record
from benchmarks.serving.target import Target
from benchmarks.serving.workload import Job

OnDone = Callable[[Record], None]
_AFTER_FAILURE_S = 0.1


@dataclass(frozen=True, slots=True)
class Load:
    """Outcome of a load."""

    records: list[Record]
    duration_s: float  # first arrival to last answer
    client_cpu_s: float  # CPU seconds of this process


async def open_loop(
    target: Target, jobs: Sequence[Job], *, timeout_s: float, on_done: OnDone
) -> Load:
    """Every job at its time, ascending. The next request is made ready while its time comes."""
    records = [_record(job) for job in jobs]
    tasks: list[asyncio.Task[None]] = []
    # Jobs that are due at once are made ready before the clock starts.
    ready = [target.prepare(job) for job in itertools.takewhile(lambda it: it.at_s <= 0, jobs)]
    cpu_s, start_s = time.process_time(), time.perf_counter()
    for i, (job, record) in enumerate(zip(jobs, records, strict=True)):
        request = ready[i] if i < len(ready) else target.prepare(job)
        record.planned_s = start_s + job.at_s
        wait_s = record.planned_s - time.perf_counter()
        if wait_s > 0:
            await asyncio.sleep(wait_s)
        tasks.append(asyncio.create_task(_send(target, request, record, timeout_s, on_done)))
    await asyncio.gather(*tasks)
    return Load(records, time.perf_counter() - start_s, time.process_time() - cpu_s)


async def closed_loop(
    target: Target,
    jobs: Iterable[Job],
    *,
    streams: int,
    seconds: float | None,
    timeout_s: float,
    on_done: OnDone,
) -> Load:
    """Keeps `streams` streams busy with one request after another.

    It ends with `jobs` or with the seconds; requests that run then are finished, and count.
    """
    records: list[Record] = []
    remaining = iter(jobs)
    cpu_s, start_s = time.process_time(), time.perf_counter()

    async def stream() -> None:
        for job in _until(remaining, None if seconds is None else start_s + seconds):
            record = _record(job)
            records.append(record)
            await _send(target, target.prepare(job), record, timeout_s, on_done)
            if record.error is not None:  # a server that is gone is not to be flooded
                await asyncio.sleep(_AFTER_FAILURE_S)

    await asyncio.gather(*(stream() for _ in range(streams)))
    return Load(records, time.perf_counter() - start_s, time.process_time() - cpu_s)


def _until(jobs: Iterator[Job], end_s: float | None) -> Iterator[Job]:
    while end_s is None or time.perf_counter() < end_s:
        job = next(jobs, None)
        if job is None:
            return
        yield job


def _record(job: Job) -> Record:
    return Record(asked_tokens=(job.prompt_tokens, job.output_tokens))


async def _send(
    target: Target, request: Any, record: Record, timeout_s: float, on_done: OnDone
) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await target.send(request, record)
    except TimeoutError:
        record.error = f"no complete answer within {timeout_s:g} s"
    except RequestFailed as error:
        record.error = str(error)
    record.end_s = time.perf_counter()
    on_done(record)
