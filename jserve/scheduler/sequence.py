"""The progress of one request, and the states it passes through.

                       finish (from any state)
      ┌───────────────────────┬───────────────────┬───────────┐
      │        admit          │      retire       │           ▼
    WAITING ────────────▶ RUNNING ───────────▶ RETIRED     FINISHED
      ▲  ▲                    │                   │
      │  └───── preempt ──────┘                   │
      └───────────────── requeue ─────────────────┘

`Lifecycle` owns every transition.
"""

import enum
from dataclasses import dataclass, field
from typing import NamedTuple

from jserve.cache.pages import NO_PAGES, Pages
from jserve.cache.prefix import PageChain
from jserve.core.logprobs import PackedLogprobs
from jserve.core.request import Request, TokenLogprobs
from jserve.scheduler.constraint import Bound

# Smaller ranks are served first and preempted last. No two sequences have the same: `Lifecycle`
# appends the number of their arrival to what the policy gives.
Rank = tuple[float, ...]


class SequenceState(enum.Enum):
    """The stages of a sequence's life; it holds a slot and pages only while RUNNING."""

    WAITING = "waiting"  # in the queue: new, preempted, or owed tokens after all
    RUNNING = "running"
    RETIRED = "retired"  # every token it may get is in flight
    FINISHED = "finished"  # no longer the scheduler's; results still in flight are dropped


class Event(enum.Enum):
    """The moments at which a policy ranks a sequence."""

    ARRIVAL = "arrival"
    FIRST_OUTPUT = "first output"  # its first token is committed
    PREEMPTION = "preemption"
    REQUEUE = "requeue"  # it had retired, and the device yielded less than planned


class SequenceView(NamedTuple):
    """The facts that a policy ranks a sequence by, as they are at an event."""

    event: Event
    request: Request
    arrival: int  # 0, 1, 2, … in the order of arrival
    arrival_s: float
    num_output: int  # committed tokens


@dataclass(slots=True, eq=False)
class Sequence:
    """Owned and changed by the scheduler alone.

    Counts include what submitted steps will do, whether committed or not: a sequence that goes on
    gets every planned token, and the counts of one that finishes are never read again. Between
    steps either `num_computed < len(context)` (chunks compute a prompt, or compute it again) or
    `num_computed == num_tokens - 1` (its last token lies on the device, and the next is decoded).
    """

    id: str  # the id of its request
    request: Request
    arrival: int
    arrival_s: float
    max_total: int  # prompt and output tokens at which it ends
    chain: PageChain  # of its prompt and of `output`
    rank: Rank = ()  # changed by `RankedQueue.rerank` alone once the sequence is in a queue
    state: SequenceState = SequenceState.WAITING  # changed by `Lifecycle` alone
    output: list[int] = field(default_factory=list[int])  # committed tokens
    queue_s: float | None = None  # arrival to first admission
    num_in_flight: int = 0  # submitted steps with a row of this sequence
    reported: bool = False  # the first update is out
    plain: bool = False  # later updates carry tokens alone
    # Collected over chunks: the prompt's positions so far, from its first one, which has none.
    prompt_logprobs: PackedLogprobs[TokenLogprobs | None] | None = None
    cached_tokens: int = 0  # of the prompt, found when it was first admitted
    num_passed: int = 0  # sequences admitted before it while it waited for a page to be shared
    num_lost: int = 0  # computed tokens that a preemption took, until they are found or not

    # Valid during the present stay in a slot:
    slot: int = 0
    pages: Pages = NO_PAGES
    context: tuple[int, ...] = ()  # tokens that chunks compute: the prompt and the output so far
    num_tokens: int = 0
    num_computed: int = 0  # positions whose K and V are written
    keep_output: int = 0  # output tokens at which another page is full and can be shared
    rewound: bool = False  # the device must be told of it anew; it keeps slot and pages
    bound: Bound | None = None  # where a constraint binds its output

    @property
    def num_context(self) -> int:
        """Tokens that the next stay in a slot must compute before it decodes."""
        return len(self.request.prompt) + len(self.output)

    @property
    def num_known(self) -> int:
        """Tokens that are known and whose K and V are in the pages, once what is in flight has run.

        Of the output since its admission, the newest token is never among them: the step that
        follows it computes it.
        """
        decoded = len(self.request.prompt) + len(self.output) - 1
        return min(self.num_computed, max(len(self.context), decoded))

    def resumes_after(self, num_computed: int) -> bool:
        """Whether it decodes next if its first `num_computed` tokens are computed.

        Only the last token is missing then, and it was sampled: a decode row computes it, as it
        would have without the interruption.
        """
        return bool(self.output) and num_computed == self.num_context - 1

    def view(self, event: Event) -> SequenceView:
        """The sequence as a policy sees it."""
        return SequenceView(event, self.request, self.arrival, self.arrival_s, len(self.output))
