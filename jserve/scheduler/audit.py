"""A copy of a scheduler's bookkeeping, and a check that it agrees: for tests and debugging."""

from collections.abc import Iterable
from typing import NamedTuple

from jserve.cache.kv_cache import KVCache
from jserve.scheduler.lifecycle import Lifecycle
from jserve.scheduler.sequence import Rank, Sequence, SequenceState


class SequenceRecord(NamedTuple):
    """A copy of a sequence's bookkeeping."""

    id: str
    state: SequenceState
    rank: Rank
    slot: int  # means something while it runs
    num_pages: int
    num_context: int  # tokens that chunks must compute
    num_computed: int
    num_in_flight: int

    @property
    def decodes(self) -> bool:
        """Whether it runs and its prompt is computed, as planned."""
        return self.state is SequenceState.RUNNING and self.num_computed >= self.num_context


class Audit(NamedTuple):
    """Every live sequence in one of three places; `problems` is empty if the books agree."""

    waiting: tuple[SequenceRecord, ...]  # by rank
    running: tuple[SequenceRecord, ...]  # by rank
    retired: tuple[SequenceRecord, ...]
    problems: tuple[str, ...]

    def find(self, sequence_id: str) -> SequenceRecord | None:
        """The record of a live sequence; None if it is not alive."""
        everyone = (*self.waiting, *self.running, *self.retired)
        return next((record for record in everyone if record.id == sequence_id), None)


def audit(live: Iterable[Sequence], lifecycle: Lifecycle, cache: KVCache) -> Audit:
    """Copies and checks every sequence, queue, slot and page; O(pages)."""
    live = list(live)
    problems = lifecycle.audit(live)
    problems += cache.audit(seq.pages for seq in live)
    for seq in live:
        if seq.state is not SequenceState.RUNNING and seq.pages.capacity:
            problems.append(f"{seq.id} is {seq.state.value} and holds pages")
        if seq.num_computed > seq.pages.capacity and seq.state is SequenceState.RUNNING:
            problems.append(f"{seq.id} has more tokens than its pages hold")
    return Audit(
        waiting=tuple(map(_record, lifecycle.waiting)),
        running=tuple(map(_record, lifecycle.running)),
        retired=tuple(_record(seq) for seq in live if seq.state is SequenceState.RETIRED),
        problems=tuple(problems),
    )


def _record(seq: Sequence) -> SequenceRecord:
    return SequenceRecord(
        seq.id,
        seq.state,
        seq.rank,
        seq.slot,
        seq.pages.num_pages,
        len(seq.context),
        seq.num_computed,
        seq.num_in_flight,
    )
