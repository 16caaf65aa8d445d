"""The ranked queue: sorted after every operation, and nobody is lost by a changed rank."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from jserve.cache.prefix import PageChain
from jserve.core.request import Request, SamplingParams
from jserve.scheduler.queue import RankedQueue
from jserve.scheduler.sequence import Sequence

RANKS = st.integers(0, 3).map(lambda first: (float(first),))  # few, so that many are equal


def sequence(name: str, *rank: float) -> Sequence:
    request = Request(id=name, prompt=(1,), sampling=SamplingParams(max_tokens=1))
    chain = PageChain(b"", (1,), [], 1)
    return Sequence(name, request, 0, 0.0, max_total=2, chain=chain, rank=rank)


class QueueMachine(RuleBasedStateMachine):
    """The model is a list, sorted stably after each insertion at its end."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = RankedQueue()
        self.model: list[Sequence] = []
        self.num_made = 0

    @rule(rank=RANKS)
    def add(self, rank: tuple[float]) -> None:
        seq = sequence(str(self.num_made), *rank)
        self.num_made += 1
        self.queue.add(seq)
        self.model.append(seq)
        self.model.sort(key=lambda seq: seq.rank)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        seq = data.draw(st.sampled_from(self.model))
        self.queue.remove(seq)
        self.model.remove(seq)
        with pytest.raises(ValueError, match="not in the queue"):
            self.queue.remove(seq)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), rank=RANKS)
    def rerank(self, data: st.DataObject, rank: tuple[float]) -> None:
        seq = data.draw(st.sampled_from(self.model))
        if rank != seq.rank:  # the same rank keeps its place among equals
            self.model.remove(seq)
            self.model.append(seq)
        self.queue.rerank(seq, rank)
        assert seq.rank == rank
        self.model.sort(key=lambda seq: seq.rank)

    @invariant()
    def the_order_agrees(self) -> None:
        assert list(self.queue) == self.model
        assert len(self.queue) == len(self.model)
        if self.model:
            assert (self.queue.first, self.queue.last) == (self.model[0], self.model[-1])


TestRankedQueue = QueueMachine.TestCase
TestRankedQueue.settings = settings(
    max_examples=50, stateful_step_count=30, deadline=None, derandomize=True
)


def test_a_member_is_found_after_its_rank_changed() -> None:
    queue = RankedQueue()
    members = [sequence(name, float(rank)) for rank, name in enumerate("abcde")]
    for seq in members:
        queue.add(seq)
    queue.rerank(members[0], (9.0,))
    assert [seq.id for seq in queue] == list("bcdea")
    for seq in members:
        queue.remove(seq)
    assert len(queue) == 0


def test_a_stranger_is_refused_and_keeps_its_rank() -> None:
    queue = RankedQueue()
    queue.add(sequence("member", 1.0))
    stranger = sequence("stranger", 1.0)
    with pytest.raises(ValueError, match="stranger is not in the queue"):
        queue.rerank(stranger, (2.0,))
    assert stranger.rank == (1.0,)
