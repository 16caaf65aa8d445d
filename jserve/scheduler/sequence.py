"""The progress of one request, and lists of sequences in the order of their rank."""

import enum
from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import attrgetter

from jserve.core.request import Request, TokenLogprobs
from jserve.scheduler.policy import Rank


class SequenceState(enum.Enum):
    """Where a sequence is; it holds a slot and pages only while RUNNING."""

    WAITING = "waiting"  # in the queue: new, or preempted
    RUNNING = "running"
    RETIRED = "retired"  # every token it may get is in flight
    FINISHED = "finished"  # no longer the scheduler's; results still in flight are dropped


@dataclass(slots=True, eq=False)
class Sequence:
    """Owned and changed by the scheduler alone.

    Counts include what submitted steps will do, whether committed or not: a sequence that does not
    finish gets every planned token, and one that does is past caring. Between steps either
    `num_computed < len(context)` (a prompt, or a recomputation, is being computed by chunks) or
    `num_computed == num_tokens - 1` (its last token lies on the device, and the next is decoded).
    """

    id: str  # of its request
    request: Request
    rank: Rank
    arrival_s: float
    max_total: int  # prompt and output tokens at which it ends
    state: SequenceState = SequenceState.WAITING
    output: list[int] = field(default_factory=list[int])  # committed tokens
    queue_s: float | None = None  # arrival to first admission
    num_in_flight: int = 0  # submitted steps with a row of this sequence
    reported: bool = False  # the first update is out
    plain: bool = False  # and the others carry tokens alone
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # collected over chunks

    # Of the present stay in a slot:
    slot: int = 0
    pages: list[int] = field(default_factory=list[int])  # its page table
    capacity: int = 0  # positions that its pages hold
    context: tuple[int, ...] = ()  # tokens that chunks compute: the prompt and the output so far
    num_tokens: int = 0
    num_computed: int = 0  # positions whose K and V are written

    @property
    def num_context(self) -> int:
        """Tokens that the next stay in a slot must compute before it decodes."""
        return len(self.request.prompt) + len(self.output)


_RANK: Callable[[Sequence], Rank] = attrgetter("rank")


def insert_ranked(sequences: list[Sequence], seq: Sequence) -> None:
    """Puts `seq` in its place."""
    insort(sequences, seq, key=_RANK)


def remove_ranked(sequences: list[Sequence], seq: Sequence) -> None:
    """Takes out `seq`, which must be there."""
    index = bisect_left(sequences, seq.rank, key=_RANK)
    if index == len(sequences) or sequences[index] is not seq:
        raise ValueError(f"{seq.request.id} is not in the list")
    del sequences[index]
