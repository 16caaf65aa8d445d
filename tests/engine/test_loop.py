"""The engine's loop over the simulated device: every update reaches the outbox."""

import threading
from dataclasses import replace

import pytest

from jserve.cache.kv_cache import KVCache
from jserve.cache.layout import single_group
from jserve.core.clock import ManualClock
from jserve.core.errors import Overloaded, Unavailable
from jserve.core.request import FinishReason, Request, SamplingParams, SequenceUpdate
from jserve.core.step import Program, ProgramKind, StepPlan
from jserve.engine.inbox import Abort, Inbox, Outbox, Submit
from jserve.engine.loop import EngineLoop
from jserve.scheduler.config import SchedulerConfig
from jserve.scheduler.scheduler import Scheduler
from jserve.scheduler.simulated_executor import SimulatedExecutor
from jserve.scheduler.simulated_model import SimulatedModel

PROGRAMS = (Program(ProgramKind.MIXED, 16, 4), Program(ProgramKind.DECODE, 4, 4, 2))
MODEL = SimulatedModel()


class Breaking(SimulatedExecutor):
    """Fails at a step, as a device does that has run out of memory."""

    fails_at = -1

    def submit(self, plan: StepPlan) -> object:
        if plan.step_id == self.fails_at:
            raise RuntimeError("the device is on fire")
        return super().submit(plan)


class Rig:
    """A loop and both of its boxes."""

    def __init__(self, max_queue: int = 16) -> None:
        sizes = {"num_slots": 4, "num_pages": 64, "page_size": 4}
        cache = KVCache(single_group(4), 64)
        self.scheduler = Scheduler(
            SchedulerConfig(max_queue=max_queue),
            cache=cache,
            num_slots=4,
            max_model_len=128,
            programs=PROGRAMS,
        )
        self.executor = Breaking(PROGRAMS, model=MODEL, **sizes)
        self.inbox, self.outbox = Inbox(), Outbox()
        self.outbox.attach(lambda: None)
        self.clock = ManualClock()
        self.loop = EngineLoop(
            self.scheduler, self.executor, self.inbox, self.outbox, self.clock, lambda: 0
        )

    def taken(self) -> tuple[dict[str, SequenceUpdate], dict[str, Exception]]:
        """Updates posted so far, merged by sequence."""
        taken = self.outbox.take()
        merged: dict[str, SequenceUpdate] = {}
        for update in taken.updates:
            known = merged.get(update.request_id)
            merged[update.request_id] = known.then(update) if known else update
        return merged, dict(taken.rejections)


def _request(name: str, max_tokens: int = 9) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens, seed=len(name), ignore_eos=True)
    return Request(id=name, prompt=(5, 6, *name.encode()), sampling=sampling)


def test_a_drain_finishes_what_came_before_it_and_refuses_the_rest() -> None:
    rig = Rig()
    requests = [_request(f"r{i}") for i in range(6)]
    rig.inbox.put(*map(Submit, requests))
    rig.loop.drain()
    rig.loop.run()  # returns by itself
    updates, rejections = rig.taken()
    assert not rejections
    for request in requests:
        tokens, finish = MODEL.generate(request, 128)
        assert updates[request.id].tokens == tuple(tokens)
        assert updates[request.id].finish is finish
    rig.inbox.put(Submit(_request("late")))
    rig.loop.run()
    assert isinstance(rig.taken()[1]["late"], Unavailable)


def test_a_stop_tells_what_it_cuts_off() -> None:
    rig = Rig()
    rig.inbox.put(Submit(_request("long", 100)), Submit(_request("also", 100)))
    for _ in range(4):
        rig.loop.run_once()
    rig.loop.stop()
    rig.loop.run()
    updates, _ = rig.taken()
    assert {update.finish for update in updates.values()} == {FinishReason.ERROR}
    assert all("stopped before" in (update.error or "") for update in updates.values())
    assert rig.scheduler.stats().free_pages == 64


def test_a_failure_reaches_every_sequence_and_is_raised() -> None:
    rig = Rig()
    rig.executor.fails_at = 3
    rig.inbox.put(*(Submit(_request(f"r{i}", 50)) for i in range(6)))
    with pytest.raises(RuntimeError, match="on fire"):
        rig.loop.run()
    updates, _ = rig.taken()
    assert sorted(updates) == [f"r{i}" for i in range(6)]
    assert all("on fire" in (update.error or "") for update in updates.values())


def test_a_full_queue_rejects_with_its_type() -> None:
    rig = Rig(max_queue=2)
    rig.inbox.put(*(Submit(_request(f"r{i}")) for i in range(4)))
    rig.loop.run_once()
    _, rejections = rig.taken()
    assert sorted(rejections) == ["r2", "r3"]
    assert all(isinstance(error, Overloaded) for error in rejections.values())


def test_an_abort_is_silent_and_frees_everything() -> None:
    rig = Rig()
    rig.inbox.put(Submit(_request("gone", 100)), Submit(_request("stays")))
    rig.loop.run_once()
    rig.taken()
    rig.inbox.put(Abort("gone"), Abort("never was"))
    rig.loop.drain()
    rig.loop.run()
    updates, _ = rig.taken()
    assert list(updates) == ["stays"]
    assert rig.scheduler.stats().free_slots == 4
    assert rig.scheduler.stats().free_pages == 64


def test_a_sequence_is_dropped_when_its_deadline_passes() -> None:
    rig = Rig()
    rig.inbox.put(
        Submit(replace(_request("late", 100), deadline_s=5.0)),
        Submit(replace(_request("ends before"), deadline_s=5.0)),
        Submit(_request("patient")),
    )
    for _ in range(8):
        rig.loop.run_once()
    updates, _ = rig.taken()
    assert updates["ends before"].finish is FinishReason.LENGTH
    rig.clock.advance(5.0)
    rig.loop.drain()
    rig.loop.run()
    updates, rejections = rig.taken()
    assert isinstance(rejections.pop("late"), Unavailable)
    assert not rejections
    assert "late" not in {name for name, update in updates.items() if update.finish}
    assert rig.scheduler.stats().free_pages == 64


def test_an_idle_loop_wakes_up_to_stop() -> None:
    rig = Rig()
    thread = threading.Thread(target=rig.loop.run)
    thread.start()
    rig.loop.stop()
    thread.join(timeout=5)
    assert not thread.is_alive()


def test_deadlines_of_ended_sequences_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jserve.engine.loop._SPARE_DEADLINES", 4)
    rig = Rig()
    rig.inbox.put(Submit(replace(_request("long", 100), deadline_s=100.0)))
    most = 0
    for i in range(40):
        rig.inbox.put(Submit(replace(_request(f"r{i}", 1), deadline_s=1e6)))
        rig.loop.run_once()
        most = max(most, len(rig.loop._deadlines))
    assert most <= 15  # of 41, with at most five alive
    rig.clock.advance(100.0)
    rig.loop.run_once()
    assert isinstance(rig.taken()[1]["long"], Unavailable)  # its deadline is kept
