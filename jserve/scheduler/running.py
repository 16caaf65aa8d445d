"""Sequences that hold a slot. Owns the slots and pages of one engine."""

import heapq

from jserve.cache.page_pool import PagePool
from jserve.scheduler.sequence import Sequence, SequenceState, insert_ranked, remove_ranked


class RunningSet:
    """Who holds which slot and pages. One owner, the scheduler; one thread.

    A sequence may leave while steps of its are in flight: programs run in the order of their
    submission, so whoever gets its slot and pages writes them later.
    """

    def __init__(self, num_slots: int, num_pages: int, page_size: int) -> None:
        if num_slots < 1 or page_size < 1:
            raise ValueError(
                f"num_slots is {num_slots}, page_size {page_size}; both are at least 1"
            )
        self.sequences: list[Sequence] = []  # by rank; changed by `enter` and `leave` only
        self._free_slots = list(range(num_slots))  # a heap: the lowest is taken first
        self._pages = PagePool(num_pages)
        self._page_size = page_size

    @property
    def num_free_slots(self) -> int:
        """Slots that nobody holds."""
        return len(self._free_slots)

    @property
    def num_free_pages(self) -> int:
        """Pages that nobody holds."""
        return self._pages.num_free

    @property
    def num_pages(self) -> int:
        """Pages in all."""
        return self._pages.num_pages

    def pages_for(self, positions: int) -> int:
        """Pages that hold so many tokens."""
        return -(-positions // self._page_size)

    def owed_pages(self) -> int:
        """Pages that half computed prompts still have to take."""
        return sum(
            self.pages_for(len(seq.context)) - len(seq.pages)
            for seq in self.sequences
            if seq.num_computed < len(seq.context)
        )

    def can_grow_all(self, steps: int) -> bool:
        """Whether free pages suffice for every sequence to decode `steps` more tokens."""
        free = self._pages.num_free
        if len(self.sequences) * self.pages_for(steps) <= free:
            return True
        needed = 0
        for seq in self.sequences:
            new = min(steps, seq.max_total - seq.num_tokens)
            needed += max(0, self.pages_for(seq.num_computed + new) - len(seq.pages))
        return needed <= free

    def most_positions(self, seq: Sequence) -> int:
        """Tokens that `seq` could hold with every free page."""
        return seq.capacity + self._pages.num_free * self._page_size

    def grow(self, seq: Sequence, positions: int) -> bool:
        """Gives `seq` pages for `positions` tokens in all; False, and none, if too few are free."""
        missing = -(-positions // self._page_size) - len(seq.pages)
        if missing > 0:
            if missing > self._pages.num_free:
                return False
            seq.pages += self._pages.take(missing)
            seq.capacity = len(seq.pages) * self._page_size
        return True

    def enter(self, seq: Sequence) -> None:
        """Gives `seq` the lowest free slot, and no pages yet."""
        seq.state = SequenceState.RUNNING
        seq.slot = heapq.heappop(self._free_slots)
        seq.context = seq.request.prompt + tuple(seq.output)
        seq.num_tokens = len(seq.context)
        seq.num_computed = 0
        insert_ranked(self.sequences, seq)

    def leave(self, seq: Sequence) -> None:
        """Takes the slot and pages of `seq` back. The caller sets its next state."""
        remove_ranked(self.sequences, seq)
        heapq.heappush(self._free_slots, seq.slot)
        self._pages.release(seq.pages)
        seq.pages = []
        seq.capacity = 0
