"""Sequences in the order of their rank."""

from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from operator import attrgetter

from jserve.scheduler.sequence import Rank, Sequence

_RANK: Callable[[Sequence], Rank] = attrgetter("rank")


class RankedQueue:
    """A list of sequences that is always sorted by rank; equal ranks stay in order of insertion.

    Members are found by their rank, so a member's rank changes in `rerank` and nowhere else.
    """

    def __init__(self) -> None:
        self._sequences: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._sequences)

    def __iter__(self) -> Iterator[Sequence]:
        """Members by rank. Whoever changes the queue on the way iterates over a copy."""
        return iter(self._sequences)

    @property
    def first(self) -> Sequence:
        """The member of the smallest rank. Raises IndexError if the queue is empty."""
        return self._sequences[0]

    @property
    def last(self) -> Sequence:
        """The member of the largest rank. Raises IndexError if the queue is empty."""
        return self._sequences[-1]

    def add(self, seq: Sequence) -> None:
        """Inserts `seq` behind every member of the same or a smaller rank."""
        insort(self._sequences, seq, key=_RANK)

    def remove(self, seq: Sequence) -> None:
        """Removes `seq`; raises ValueError if it is not a member."""
        del self._sequences[self._index(seq)]

    def rerank(self, seq: Sequence, rank: Rank) -> None:
        """Gives the member `seq` another rank and moves it there.

        The sequence is removed by its old rank before it gets the new one: after the change it
        could no longer be found. Raises ValueError if it is not a member.
        """
        if rank == seq.rank:
            return
        self.remove(seq)
        seq.rank = rank
        self.add(seq)

    def _index(self, seq: Sequence) -> int:
        sequences = self._sequences
        for index in range(bisect_left(sequences, seq.rank, key=_RANK), len(sequences)):
            if sequences[index] is seq:
                return index
            if sequences[index].rank != seq.rank:
                break
        raise ValueError(f"{seq.id} is not in the queue")
