"""Sequences in the order of their rank."""

from bisect import bisect_left, insort
from collections.abc import Callable, Collection, Iterator, Mapping
from operator import attrgetter

from jserve.scheduler.sequence import Rank, Sequence

_RANK: Callable[[Sequence], Rank] = attrgetter("rank")
_MAX_TURNS = 4096  # of tenants who may not wait any more; all of those are forgotten above it


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


class WaitingQueue(RankedQueue):
    """Sequences that wait, of tenants who take turns.

    The next one is of the smallest priority; among those, one that ran before goes first, since it
    only continues; then it is the turn of the tenant who was served the longest time ago; of one
    tenant the smallest rank is next. A tenant who begins to wait gets the turn of the one who waits
    for the longest time, and no earlier: one that returns after each answer gets its share only.
    """

    def __init__(self) -> None:
        super().__init__()
        self._of_tenants: dict[str, RankedQueue] = {}
        self._turns: dict[str, int] = {}  # number of each tenant's last turn, or as if it had one
        self._num_turns = 0

    def add(self, seq: Sequence) -> None:
        super().add(seq)
        tenant = seq.request.tenant
        if tenant not in self._of_tenants:
            waiting = min((self._turns[other] for other in self._of_tenants), default=0)
            self._turns[tenant] = max(self._turns.get(tenant, 0), waiting)
            self._of_tenants[tenant] = RankedQueue()
        self._of_tenants[tenant].add(seq)

    def remove(self, seq: Sequence) -> None:
        super().remove(seq)
        tenant = seq.request.tenant
        queue = self._of_tenants[tenant]
        queue.remove(seq)
        if not len(queue):
            del self._of_tenants[tenant]
            if len(self._turns) > _MAX_TURNS:
                self._turns = {other: self._turns[other] for other in self._of_tenants}

    def serve(self, seq: Sequence) -> None:
        """Removes the member `seq`, which gets its slot: its tenant has had its turn."""
        self._num_turns += 1
        self._turns[seq.request.tenant] = self._num_turns
        self.remove(seq)

    def next(
        self, num_running: Mapping[str, int], passed: Collection[Sequence] = ()
    ) -> Sequence | None:
        """The member to be served next, None if there is none; those `passed` over are left out.

        Their tenants come after others of the same priority: who waits of its own accord must not
        hold up the rest.

        `num_running` counts the slots of each tenant; one that holds as many as it may is left out.
        """
        waits = {seq.request.tenant for seq in passed}
        best: Sequence | None = None
        best_key: tuple[object, ...] = ()
        for tenant, queue in self._of_tenants.items():
            seq = queue.first if not passed else _first_but(queue, passed)
            if seq is None:
                continue
            most = seq.request.tenant_slots
            if most and num_running.get(tenant, 0) >= most:
                continue
            is_new = seq.queue_s is None
            key = (seq.request.priority, is_new, tenant in waits, self._turns[tenant], seq.rank)
            if best is None or key < best_key:
                best, best_key = seq, key
        return best


def _first_but(queue: RankedQueue, passed: Collection[Sequence]) -> Sequence | None:
    """The first member that is not among `passed`; sequences are equal to themselves alone."""
    return next((seq for seq in queue if seq not in passed), None)
