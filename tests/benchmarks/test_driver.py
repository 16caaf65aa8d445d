import asyncio
import itertools
import time

from benchmarks.serving.driver import closed_loop, open_loop
from benchmarks.serving.failures import RequestFailed
from benchmarks.serving.workload import Job


class SlowTarget:
    """Takes a while for each request, and refuses those of one token."""

    def __init__(self, answer_s=0.002):
        self.running = self.most = 0
        self.sent = []
        self._answer_s = answer_s

    async def check(self):
        raise NotImplementedError

    def prepare(self, job):
        return job

    async def send(self, request, record):
        record.sent_s = time.perf_counter()
        self.sent.append(request)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await asyncio.sleep(self._answer_s)
        finally:
            self.running -= 1
        if request.output_tokens == 1:
            raise RequestFailed("too short")
        record.output_tokens = request.output_tokens
        record.finish(time.perf_counter())

    async def close(self):
        pass


def jobs(*times, output_tokens=4):
    return [Job(at_s, 3, output_tokens, (i,)) for i, at_s in enumerate(times)]


def test_open_loop_does_not_wait_for_answers():
    target = SlowTarget(answer_s=0.05)
    load = asyncio.run(
        open_loop(target, jobs(0, 0, 0.01, 0.02), timeout_s=5, on_done=lambda record: None)
    )
    assert target.most == 4
    planned = [record.planned_s - load.records[0].planned_s for record in load.records]
    assert [round(at_s, 6) for at_s in planned] == [0, 0, 0.01, 0.02]
    assert all(record.sent_s >= record.planned_s for record in load.records)
    assert all(record.error is None and record.end_s > record.sent_s for record in load.records)


def test_failures_are_counted_and_the_rest_goes_on():
    target, done = SlowTarget(), []
    mixed = jobs(0, 0) + jobs(0, output_tokens=1)
    load = asyncio.run(open_loop(target, mixed, timeout_s=5, on_done=done.append))
    assert [record.error for record in load.records] == [None, None, "too short"]
    assert len(done) == 3


def test_a_request_may_take_too_long():
    load = asyncio.run(
        open_loop(SlowTarget(30), jobs(0), timeout_s=0.01, on_done=lambda record: None)
    )
    assert load.records[0].error == "no complete answer within 0.01 s"


def test_closed_loop_keeps_so_many_streams():
    target = SlowTarget()
    load = asyncio.run(
        closed_loop(
            target,
            jobs(*[0] * 20),
            streams=3,
            seconds=None,
            timeout_s=5,
            on_done=lambda record: None,
        )
    )
    assert target.most == 3
    assert len(load.records) == 20
    assert [job.seed for job in target.sent] == [(i,) for i in range(20)]


def test_closed_loop_ends_in_time():
    endless = (Job(0, 3, 4, (i,)) for i in itertools.count())
    load = asyncio.run(
        closed_loop(
            SlowTarget(),
            endless,
            streams=2,
            seconds=0.03,
            timeout_s=5,
            on_done=lambda record: None,
        )
    )
    assert load.records
    assert load.duration_s >= 0.03
    assert all(record.error is None for record in load.records)
