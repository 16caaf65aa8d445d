"""The stream between leader and followers over a real loopback socket, without devices."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

from jserve.core.errors import ConfigError, EngineError
from jserve.core.step import Chunk, Move, MoveKind, NewPages, Program, ProgramKind, StepPlan
from jserve.engine.group import leader as leader_module
from jserve.engine.group.follower import Leader, follow
from jserve.engine.group.leader import Followers
from jserve.engine.group.processes import bind_address
from jserve.engine.program.batch import Batch, BatchShape, pack
from jserve.proto.steps import StepReader

PROGRAM = Program(ProgramKind.DECODE, 2, 2)
SHAPE = BatchShape(num_slots=2, vocab=8, page_size=4, processor_rows=1, pages_per_slot=8)
FACTS = {"jax": "1", "engine.num_slots": "2"}


def moved(position: int) -> Move:
    return Move(MoveKind.OUT, 0, position, 3)


def plan(position: int) -> StepPlan:
    chunk = Chunk(1, "", position, 1, pages=(NewPages(0, 0, (position,)),))
    return StepPlan(0, PROGRAM, 1, (chunk,), moves=(moved(position),))


class Losses:
    """Keeps the words of a callback about a lost peer."""

    def __init__(self) -> None:
        self.heard = threading.Event()
        self.reasons: list[str] = []

    def __call__(self, reason: str) -> None:
        self.reasons.append(reason)
        self.heard.set()


@dataclass
class Recorder:
    """Stands in for the executor of a follower."""

    pages: list[int] = field(default_factory=list)
    moves: list[Move] = field(default_factory=list)
    spoil: bool = False

    def pack(self, plan: StepPlan) -> Batch:
        batch = pack(plan, SHAPE, ())
        batch.buffer[-1] += self.spoil
        return batch

    def run(self, batch: Batch) -> "Recorder":
        self.pages.append(int(batch.buffer.max()))
        self.moves += batch.moves
        return self

    def wait(self, step: "Recorder") -> None:
        pass


@contextmanager
def leading(
    num_followers: int, on_loss: Callable[[str], None], address: str = "127.0.0.1:0"
) -> Iterator[Followers]:
    followers = Followers(address, num_followers, FACTS, (PROGRAM,), on_loss)
    try:
        yield followers
    finally:
        followers.close()


def join(followers: Followers, process: int, losses: Losses, facts: dict | None = None) -> Leader:
    return Leader(followers.address, process, facts or FACTS, join_timeout_s=10, on_loss=losses)


@contextmanager
def joined(
    process: int = 1, executor: Recorder | None = None
) -> Iterator[tuple[Followers, Losses, Leader, Losses]]:
    """A leader and one follower that has joined."""
    lost_follower, lost_leader = Losses(), Losses()
    with leading(1, lost_follower) as followers, ThreadPoolExecutor(1) as pool:
        joining = pool.submit(join, followers, process, lost_leader)
        followers.start("host:1", 10)
        with joining.result(10) as leader:
            yield followers, lost_follower, leader, lost_leader


def test_steps_come_in_order_and_end_with_a_stop() -> None:
    lost = Losses()
    executors = [Recorder(), Recorder()]

    def run(process: int) -> None:
        with join(followers, process, lost) as leader:
            assert leader.coordinator_address == "host:1"
            leader.ready({"pages": "7"})
            follow(executors[process - 1], StepReader((PROGRAM,)), leader)

    with leading(2, lost) as followers, ThreadPoolExecutor(2) as pool:
        running: list[Future[None]] = [pool.submit(run, process) for process in (2, 1)]
        followers.start("host:1", 10)
        followers.wait_ready({"pages": "7"})
        for position in range(2, 102):
            followers.publish(plan(position), pack(plan(position), SHAPE, ()))
        followers.stop(10)
        for done in running:
            done.result(10)
    assert [executor.pages for executor in executors] == [list(range(2, 102))] * 2
    assert [executor.moves for executor in executors] == [list(map(moved, range(2, 102)))] * 2
    assert lost.reasons == []


def test_a_leader_with_a_name_listens_on_all_its_interfaces() -> None:
    """A host's own name may be 127.0.1.1 to itself, where no other host would find it."""
    assert bind_address("host0:8610") == "[::]:8610"
    assert bind_address("127.0.1.1:8610") == "127.0.1.1:8610"
    assert bind_address("[::1]:0") == "[::1]:0"
    lost = Losses()
    with leading(1, Losses(), "host0:0") as followers, ThreadPoolExecutor(1) as pool:
        port = followers.address.removeprefix("host0:")
        joining = pool.submit(
            Leader, f"127.0.0.1:{port}", 1, FACTS, join_timeout_s=10, on_loss=lost
        )
        followers.start("host0:1", 10)
        joining.result(10).__exit__()


def test_a_process_that_differs_is_told_what_differs() -> None:
    with leading(1, Losses()) as followers:
        with pytest.raises(ConfigError, match=r"engine\.num_slots is 3 there and 2 here$"):
            join(followers, 1, Losses(), FACTS | {"engine.num_slots": "3"})
        with pytest.raises(ConfigError, match="there is no process 2"):
            join(followers, 2, Losses())
        with pytest.raises(EngineError, match=r"\[1\] of the engine have not joined"):
            followers.start("host:1", 0.01)


def test_a_second_process_of_a_number_proves_that_the_first_is_lost() -> None:
    """The first one's connection may stand for a while after its host's sudden death."""
    with joined() as (followers, lost_follower, _, _):
        with pytest.raises(EngineError, match="process 1 had joined already"):
            join(followers, 1, Losses())
        assert lost_follower.heard.wait(5)
    (reason,) = lost_follower.reasons
    assert reason.startswith("process 1 of the engine ended: another has joined as this process")


def test_engines_that_differ_are_refused() -> None:
    with joined() as (followers, _, leader, _):
        leader.ready({"pages": "64"})
        with pytest.raises(ConfigError, match="pages is 64 there and 128 here"):
            followers.wait_ready({"pages": "128"})


def test_no_leader_is_worth_another_try() -> None:
    with pytest.raises(EngineError, match=r"no leader at 127\.0\.0\.1:1 after"):
        Leader("127.0.0.1:1", 1, FACTS, join_timeout_s=0.05, on_loss=Losses())


def test_the_leader_hears_of_a_follower_that_goes() -> None:
    with joined() as (_, lost_follower, leader, _):
        leader.__exit__()
        assert lost_follower.heard.wait(5)
    assert lost_follower.reasons == ["process 1 of the engine ended: its connection broke"]


def test_the_leader_hears_why_a_follower_fails() -> None:
    with joined() as (followers, lost_follower, leader, _), ThreadPoolExecutor(1) as pool:
        telling = pool.submit(leader.failed, "no memory")
        assert lost_follower.heard.wait(5)
        followers.close()  # ends all streams, like the leader's end
        telling.result(5)
    assert lost_follower.reasons == ["process 1 of the engine ended: no memory"]


def test_a_follower_hears_that_the_leader_is_gone() -> None:
    with joined() as (followers, lost_follower, leader, lost_leader):
        followers.close()
        with pytest.raises(EngineError, match="connection to the leader broke"):
            next(leader.steps())
        assert lost_leader.heard.wait(5)
    assert lost_follower.reasons == []


def test_a_follower_that_stays_behind_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leader_module, "_SEND_TIMEOUT_S", 0.01)
    follower = leader_module._Follower(1)
    for _ in range(64):
        follower.send(None)
    with pytest.raises(EngineError, match="process 1 is 64 steps behind"):
        follower.send(None)


def test_a_step_that_is_not_the_leaders_is_fatal() -> None:
    with joined() as (followers, _, leader, _):
        followers.publish(plan(3), pack(plan(3), SHAPE, ()))
        with pytest.raises(EngineError, match="step 0 is not what the leader runs"):
            follow(Recorder(spoil=True), StepReader((PROGRAM,)), leader)


def test_the_leader_tells_whose_engine_it_waits_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(leader_module, "_REMINDER_S", 0.05)
    with joined() as (followers, _, leader, _), ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(followers.wait_ready, {})
        with pytest.raises(TimeoutError):
            waiting.result(0.3)
        leader.ready({})
        waiting.result(10)
    assert [1] in [getattr(record, "processes", None) for record in caplog.records]
