"""The state machine of sequences, with the queues, slots and pages that it moves them between."""

import heapq

from jserve.cache.page_pool import PagePool
from jserve.scheduler.policy import Policy
from jserve.scheduler.queue import RankedQueue
from jserve.scheduler.sequence import Event, Sequence, SequenceState


class Lifecycle:
    """Owns the state and rank of every sequence, who waits, who runs, and the slots.

    Each method is one transition of the diagram in `sequence`; from any other state it raises
    ValueError. A sequence may leave its slot while steps of it are in flight: programs run in the
    order of their submission, so the next owner of its slot and pages writes them later.
    """

    def __init__(self, policy: Policy, *, num_slots: int, num_pages: int, page_size: int) -> None:
        if num_slots < 1 or page_size < 1:
            raise ValueError(
                f"num_slots is {num_slots}, page_size {page_size}; both are at least 1"
            )
        # Others read the queues; only this class changes them.
        self.waiting = RankedQueue()
        self.running = RankedQueue()
        self._policy = policy
        self._free_slots = list(range(num_slots))  # a heap: the lowest is taken first
        self._pages = PagePool(num_pages)
        self._page_size = page_size

    @property
    def num_free_slots(self) -> int:
        """Slots that nobody holds."""
        return len(self._free_slots)

    # Transitions.

    def arrive(self, seq: Sequence, now_s: float) -> None:
        """Puts the new `seq` into the waiting queue."""
        self._wait(seq, Event.ARRIVAL, now_s)

    def admit(self, seq: Sequence) -> None:
        """WAITING → RUNNING, with the lowest free slot and no pages yet."""
        _require(seq, SequenceState.WAITING)
        self.waiting.remove(seq)
        seq.state = SequenceState.RUNNING
        seq.slot = heapq.heappop(self._free_slots)
        seq.context = seq.request.prompt + tuple(seq.output)
        seq.num_tokens = len(seq.context)
        seq.num_computed = 0
        self.running.add(seq)

    def preempt(self, seq: Sequence, now_s: float) -> None:
        """RUNNING → WAITING; tokens in flight still count when their step is committed."""
        self._vacate(seq)
        self._wait(seq, Event.PREEMPTION, now_s)

    def retire(self, seq: Sequence) -> None:
        """RUNNING → RETIRED: the last token of `seq` is in flight, its slot and pages are free."""
        self._vacate(seq)
        seq.state = SequenceState.RETIRED

    def requeue(self, seq: Sequence, now_s: float) -> None:
        """RETIRED → WAITING: the device yielded less than planned, so tokens are owed after all."""
        _require(seq, SequenceState.RETIRED)
        self._wait(seq, Event.REQUEUE, now_s)

    def finish(self, seq: Sequence) -> None:
        """Any state → FINISHED; what `seq` holds is free at once."""
        if seq.state is SequenceState.WAITING:
            self.waiting.remove(seq)
        elif seq.state is SequenceState.RUNNING:
            self._vacate(seq)
        seq.state = SequenceState.FINISHED

    # Decisions of the policy.

    def note_first_output(self, seq: Sequence, now_s: float) -> None:
        """Ranks `seq` again now that its first token is committed."""
        rank = self._policy.rank(seq.view(Event.FIRST_OUTPUT), now_s)
        if seq.state is SequenceState.WAITING:
            self.waiting.rerank(seq, rank)
        elif seq.state is SequenceState.RUNNING:
            self.running.rerank(seq, rank)
        else:
            seq.rank = rank

    def victim(self, for_seq: Sequence) -> Sequence:
        """The running sequence to preempt so that `for_seq` gets pages; it may be `for_seq`.

        Raises:
            ValueError: the policy chose a sequence that does not rank behind `for_seq`. The first
                in rank must always get on, or two could take pages from each other for ever.
        """
        victim = self._policy.victim(self.running, for_seq)
        if victim is not for_seq and victim.rank <= for_seq.rank:
            raise ValueError(f"the policy preempts {victim.id}, which is not behind {for_seq.id}")
        return victim

    def _wait(self, seq: Sequence, event: Event, now_s: float) -> None:
        seq.state = SequenceState.WAITING
        seq.rank = self._policy.rank(seq.view(event), now_s)
        self.waiting.add(seq)

    def _vacate(self, seq: Sequence) -> None:
        """Takes slot and pages of the running `seq` back; the caller sets its next state."""
        _require(seq, SequenceState.RUNNING)
        self.running.remove(seq)
        heapq.heappush(self._free_slots, seq.slot)
        self._pages.release(seq.pages)
        seq.pages = []
        seq.capacity = 0

    # Memory.

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
            for seq in self.running
            if seq.num_computed < len(seq.context)
        )

    def can_grow_all(self, steps: int) -> bool:
        """Whether free pages suffice for every sequence to decode `steps` more tokens."""
        free = self._pages.num_free
        if len(self.running) * self.pages_for(steps) <= free:
            return True
        needed = 0
        for seq in self.running:
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


def _require(seq: Sequence, state: SequenceState) -> None:
    if seq.state is not state:
        raise ValueError(f"{seq.id} is {seq.state.value}, not {state.value}")
