"""The state machine of sequences, with the queues and slots that it moves them between."""

import heapq
from collections import Counter
from collections.abc import Collection

from jserve.cache.kv_cache import KVCache
from jserve.cache.pages import Hit, PageDelta
from jserve.scheduler.policy import Policy
from jserve.scheduler.queue import RankedQueue, WaitingQueue
from jserve.scheduler.sequence import Event, Rank, Sequence, SequenceState


class Lifecycle:
    """Owns the state and rank of every sequence, who waits, who runs, and the slots.

    `arrive` and `finish` are the start and the end of the diagram in `sequence`. `admit`,
    `preempt`, `retire` and `requeue` are the transitions between; they raise ValueError for a
    sequence in another state. A sequence may leave its slot while steps of it are in flight:
    programs run in the order of their submission, so the next owner of its slot and pages writes
    them later.
    """

    def __init__(self, policy: Policy, cache: KVCache, num_slots: int) -> None:
        if num_slots < 1:
            raise ValueError(f"num_slots is {num_slots}; an engine has at least 1")
        # Others read the queues; only this class changes them.
        self.waiting = WaitingQueue()
        self.running = RankedQueue()
        self._policy = policy
        self._num_slots = num_slots
        self._free_slots = list(range(num_slots))  # a heap: the lowest is taken first
        self._slots_of: dict[str, int] = {}  # slots that each tenant holds
        self._cache = cache

    @property
    def num_free_slots(self) -> int:
        """Slots that nobody holds."""
        return len(self._free_slots)

    @property
    def next_slot(self) -> int:
        """The slot that `admit` gives next: the lowest that is free."""
        return self._free_slots[0]

    def next_waiting(self, passed: Collection[Sequence] = ()) -> Sequence | None:
        """The sequence that waits for a slot and gets it next; None if nobody may have one.

        Those `passed` over are left out.
        """
        return self.waiting.next(self._slots_of, passed)

    # Transitions.

    def arrive(self, seq: Sequence, now_s: float) -> None:
        """New → WAITING; `seq` must be in no queue."""
        self._wait(seq, Event.ARRIVAL, now_s)

    def admit(self, seq: Sequence, hit: Hit) -> PageDelta:
        """WAITING → RUNNING in `next_slot`; returns the pages of `hit`, which are its first."""
        _require(seq, SequenceState.WAITING)
        self.waiting.serve(seq)
        seq.state = SequenceState.RUNNING
        tenant = seq.request.tenant
        self._slots_of[tenant] = self._slots_of.get(tenant, 0) + 1
        seq.slot = heapq.heappop(self._free_slots)
        tokens = seq.chain.tokens()
        if hit.num_tokens >= len(tokens):
            raise ValueError(f"{seq.id}: a hit of {hit.num_tokens} tokens leaves none to compute")
        seq.context = tokens[:-1] if seq.resumes_after(hit.num_tokens) else tokens
        seq.num_tokens = len(tokens)
        seq.num_computed = hit.num_tokens
        seq.pages, delta = self._cache.adopt(hit, seq.chain, len(seq.context))
        self.keep(seq)
        self.running.add(seq)
        return delta

    def preempt(self, seq: Sequence, now_s: float) -> None:
        """RUNNING → WAITING; tokens in flight still count when their step is committed."""
        self._vacate(seq)
        self._wait(seq, Event.PREEMPTION, now_s)

    def rewind(self, seq: Sequence, num_forced: int = 0) -> None:
        """The running `seq` goes on after its output: what came behind it does not stand.

        It keeps its slot and its pages, which are written again. The last `num_forced` tokens of
        the output were not sampled: they, and the one before them, are computed by a chunk.
        """
        _require(seq, SequenceState.RUNNING)
        tokens = seq.chain.tokens()
        seq.num_tokens = len(tokens)
        seq.num_computed = len(tokens) - num_forced - 1
        seq.context = tokens[:-1] if seq.resumes_after(seq.num_computed) else tokens
        seq.rewound = True

    def retire(self, seq: Sequence) -> None:
        """RUNNING → RETIRED: the last token of `seq` is in flight, its slot and pages are free."""
        self._leave_slot(seq)
        self._cache.retire(seq.pages, seq.num_known, seq.num_computed)
        seq.state = SequenceState.RETIRED

    def requeue(self, seq: Sequence, now_s: float) -> None:
        """RETIRED → WAITING: the device yielded less than planned, so tokens are owed after all."""
        _require(seq, SequenceState.RETIRED)
        self._cache.settle(seq.pages, seq.num_known)
        self._wait(seq, Event.REQUEUE, now_s)

    def finish(self, seq: Sequence) -> None:
        """Any state → FINISHED; what `seq` holds is free at once. A second call does nothing."""
        if seq.state is SequenceState.WAITING:
            self.waiting.remove(seq)
        elif seq.state is SequenceState.RUNNING:
            self._vacate(seq)
        elif seq.state is SequenceState.RETIRED:
            self._cache.settle(seq.pages, seq.num_known)
        seq.state = SequenceState.FINISHED

    def keep(self, seq: Sequence) -> None:
        """Lets others share what the running `seq` has computed by the end of the latest plan."""
        following = self._cache.keep(seq.pages, seq.num_known)
        # The newest output token is not computed yet.
        seq.keep_output = following - len(seq.request.prompt) + 1

    # Decisions of the policy.

    def note_first_output(self, seq: Sequence, now_s: float) -> None:
        """Ranks `seq` again now that its first token is committed."""
        rank = self._rank(seq, Event.FIRST_OUTPUT, now_s)
        if seq.state is SequenceState.WAITING:
            self.waiting.rerank(seq, rank)
        elif seq.state is SequenceState.RUNNING:
            self.running.rerank(seq, rank)
        else:
            seq.rank = rank

    def victim(self, for_seq: Sequence) -> Sequence:
        """The running sequence to preempt so that `for_seq` gets pages; it may be `for_seq`.

        The first in rank must always get on, or sequences could take pages from each other, or
        give up their own, for ever. So it takes from the last if the policy chooses it itself.

        Raises:
            ValueError: the policy chose a sequence that ranks before `for_seq`.
        """
        victim = self._policy.victim(self.running, for_seq)
        if victim.rank < for_seq.rank:
            raise ValueError(f"the policy preempts {victim.id}, which is not behind {for_seq.id}")
        return self.running.last if victim is self.running.first else victim

    def _rank(self, seq: Sequence, event: Event, now_s: float) -> Rank:
        """The rank by the policy and, where that is equal, by arrival."""
        return (*self._policy.rank(seq.view(event), now_s), seq.arrival)

    def _wait(self, seq: Sequence, event: Event, now_s: float) -> None:
        seq.state = SequenceState.WAITING
        seq.rank = self._rank(seq, event, now_s)
        self.waiting.add(seq)

    def _vacate(self, seq: Sequence) -> None:
        """Takes slot and pages of the running `seq` back; the caller sets its next state."""
        self._leave_slot(seq)
        self._cache.release(seq.pages, seq.num_known)
        seq.rewound = False

    def _leave_slot(self, seq: Sequence) -> None:
        _require(seq, SequenceState.RUNNING)
        self.running.remove(seq)
        heapq.heappush(self._free_slots, seq.slot)
        tenant = seq.request.tenant
        self._slots_of[tenant] -= 1
        if not self._slots_of[tenant]:
            del self._slots_of[tenant]

    def audit(self, live: list[Sequence]) -> list[str]:
        """Lists what is wrong if `live` are all sequences; for tests."""
        problems: list[str] = []
        queues = ((self.waiting, SequenceState.WAITING), (self.running, SequenceState.RUNNING))
        for queue, state in queues:
            members = list(queue)
            if sorted(members, key=lambda seq: seq.rank) != members:
                problems.append(f"the {state.value} are not sorted by rank")
            if {id(seq) for seq in members} != {id(seq) for seq in live if seq.state is state}:
                problems.append(f"the {state.value} queue does not hold who is {state.value}")
        slots = sorted([*self._free_slots, *(seq.slot for seq in self.running)])
        held = Counter(seq.request.tenant for seq in self.running)
        if held != self._slots_of:
            problems.append(f"tenants hold {dict(held)}, counted are {self._slots_of}")
        if slots != list(range(self._num_slots)):
            problems.append(f"slots are lost or held twice: {slots}")
        return problems


def _require(seq: Sequence, state: SequenceState) -> None:
    if seq.state is not state:
        raise ValueError(f"{seq.id} is {seq.state.value}, not {state.value}")
