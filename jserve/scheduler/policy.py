"""Policies decide who goes first and who makes room: pure functions. The scheduler allocates."""

from collections.abc import Callable
from dataclasses import dataclass

from jserve.scheduler.queue import RankedQueue
from jserve.scheduler.sequence import Rank, Sequence, SequenceView


@dataclass(frozen=True, slots=True)
class Policy:
    """The two decisions of a scheduling policy.

    Attributes:
        rank: ranks a sequence at an event, from a view of it and the time in seconds. It is called
            on events only, never per step: what must grow with time belongs into the rank itself
            (a deadline, not the slack that is left). All ranks have the same length; of two that
            are equal, the earlier arrival goes first.
        victim: chooses which of the running sequences gives its pages back when `for_seq` lacks
            some. The victim ranks behind `for_seq`, or is `for_seq`; but the first in rank, if it
            is chosen for itself, takes from the last. It only reads them.
    """

    rank: Callable[[SequenceView, float], Rank]
    victim: Callable[[RankedQueue, Sequence], Sequence]


def by_priority_and_arrival(view: SequenceView, now_s: float) -> Rank:
    """Ranks the smaller `priority` first, then the earlier arrival; no event changes that."""
    return (view.request.priority, view.arrival)


def last_in_rank(running: RankedQueue, for_seq: Sequence) -> Sequence:
    """Chooses the sequence that would be served last."""
    return running.last


FIRST_COME_FIRST_SERVED = Policy(rank=by_priority_and_arrival, victim=last_in_rank)


def decode_steps(most: int, remaining: list[int], *, waiting: bool) -> int:
    """Decode steps of the next run, at most `most`.

    `remaining` are the tokens that each row may still get; no run outlasts the longest. While
    somebody waits, it ends where the first row reaches its limit: the slot is taken over at once.
    """
    ends = min if waiting else max
    return min(most, ends(remaining, default=0))
