"""Builds the next step: who is admitted, who grows, who is preempted, in which program."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from jserve.core.step import Admission, Chunk, NewPages, Program, StepPlan
from jserve.scheduler.config import SchedulerConfig
from jserve.scheduler.pace import Pace
from jserve.scheduler.policy import decode_steps
from jserve.scheduler.programs import ProgramTable
from jserve.scheduler.running import RunningSet
from jserve.scheduler.sequence import Sequence, SequenceState, insert_ranked, remove_ranked
from jserve.scheduler.stats import Counters


@dataclass(slots=True)
class Rows:
    """The rows of a step, each one entry of every list."""

    chunks: list[Chunk] = field(default_factory=list[Chunk])
    sequences: list[Sequence] = field(default_factory=list[Sequence])


@dataclass(slots=True)
class Step:
    """A step from its planning to its commit."""

    plan: StepPlan
    rows: Rows
    planned_s: float = 0.0


# A decode row: its sequence, the index of its first new page, the tokens it yields at most.
_Decode = tuple[Sequence, int, int]


@dataclass(slots=True)
class _Grant:
    """Prompt tokens of one sequence in the step that is built."""

    seq: Sequence
    first_page: int  # pages from here on are new
    num_tokens: int = 0


@dataclass(slots=True)
class _Draft:
    """A mixed step that is built. Decode rows come first, then prompts by rank."""

    left: int  # prompt tokens that the step still holds
    share: int  # prompt tokens that one sequence gets before others had theirs
    decodes: list[_Decode] = field(default_factory=list[_Decode])
    prompts: list[_Grant] = field(default_factory=list[_Grant])
    admissions: list[Admission] = field(default_factory=list[Admission])


class Planner:
    """Who waits and who runs. Owns the queue and, through `running`, slots and pages.

    Memory goes by rank, across decodes and prompts: a sequence that lacks a page takes it from the
    last of the running, which is computed again later, in its old place of the queue. So the first
    in rank always gets on, and every sequence ends.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        *,
        programs: ProgramTable,
        running: RunningSet,
        counters: Counters,
        max_processor_rows: int,
    ) -> None:
        self.running = running
        self.waiting: list[Sequence] = []  # by rank; changed here only
        self._config = config
        self._programs = programs
        self._counters = counters
        self._max_processor_rows = max_processor_rows
        self._step_tokens = programs.step_tokens(config.step_tokens)
        self.pace = Pace()

    def enqueue(self, seq: Sequence) -> None:
        """Puts `seq` in its place of the queue."""
        seq.state = SequenceState.WAITING
        insert_ranked(self.waiting, seq)

    def drop(self, seq: Sequence) -> None:
        """Ends `seq`, wherever it is; what it holds is free at once."""
        if seq.state is SequenceState.WAITING:
            remove_ranked(self.waiting, seq)
        elif seq.state is SequenceState.RUNNING:
            self.running.leave(seq)
        seq.state = SequenceState.FINISHED

    def plan(self, now_s: float) -> Step | None:
        """The next step, with slots, pages and counts of its sequences as after it."""
        running = self.running.sequences
        if self._head_fits() or any(seq.num_computed < len(seq.context) for seq in running):
            step = self._mixed_step(now_s)
        else:
            step = self._decode_step()
        if not step.plan.chunks:
            return None
        step.planned_s = now_s
        self._counters.num_steps += 1
        for seq in step.rows.sequences:
            if seq.num_tokens == seq.max_total:  # its last token is in flight: it needs no more
                self.running.leave(seq)
                seq.state = SequenceState.RETIRED
        return step

    def _decode_step(self) -> Step:
        running = self.running.sequences
        bounds = (
            self._programs.max_decode_steps(len(running)),
            self._config.decode_steps,
            self.pace.steps_within(self._config.decode_wait_s),
        )
        steps = decode_steps(
            min(bound for bound in bounds if bound is not None),
            [seq.max_total - seq.num_tokens for seq in running],
            waiting=bool(self.waiting),
        )
        while steps > 1 and not self.running.can_grow_all(steps):
            steps //= 2  # rather a shorter run than a preemption
        decodes: list[_Decode] = []
        for seq in running:  # which may lose its end to a preemption
            left = seq.max_total - seq.num_tokens
            new = left if left < steps else steps
            first_page = len(seq.pages)
            # Most have room; the test here saves a call for every row.
            if seq.num_computed + new <= seq.capacity or self._reserve(seq, new):
                decodes.append((seq, first_page, new))
        rows = _decode_rows(decodes)
        return self._step(self._programs.decode(len(rows.chunks), steps), steps, rows)

    def _step(
        self, program: Program, num_steps: int, rows: Rows, admissions: Iterable[Admission] = ()
    ) -> Step:
        plan = StepPlan(
            step_id=self._counters.num_steps,
            program=program,
            num_steps=num_steps,
            chunks=tuple(rows.chunks),
            admissions=tuple(admissions),
        )
        return Step(plan, rows)

    def _mixed_step(self, now_s: float) -> Step:
        running = self.running.sequences
        left = self._step_tokens - sum(s.num_computed >= len(s.context) for s in running)
        draft = _Draft(left=left, share=-(-left // self._config.max_partial_prefills))
        for seq in running:  # which may lose its end to a preemption
            first_page = len(seq.pages)
            if seq.num_computed < len(seq.context):
                self._grant(draft, _Grant(seq, first_page))
            elif self._reserve(seq, 1):
                draft.decodes.append((seq, first_page, 1))
        self._admit(draft, now_s)
        for grant in draft.prompts:  # what the shares of others left over
            self._extend(draft, grant, draft.left)
        return self._build_mixed(draft)

    def _build_mixed(self, draft: _Draft) -> Step:
        rows = _decode_rows(draft.decodes)
        num_tokens = len(draft.decodes)
        for grant in draft.prompts:
            if grant.num_tokens > 0:
                _add_prompt(rows, grant)
                num_tokens += grant.num_tokens
        if num_tokens > len(draft.decodes):
            program = self._programs.mixed(num_tokens, len(rows.chunks))
        else:
            program = self._programs.decode(num_tokens, 1)
        return self._step(program, 1, rows, draft.admissions)

    # Admission: from the head of the queue, so nobody is overtaken.

    def _admission_room(self) -> int:
        """Pages for newcomers: free, not owed to half computed prompts, not kept for growth."""
        headroom = self._config.headroom_pages * len(self.running.sequences)
        return self.running.num_free_pages - self.running.owed_pages() - headroom

    def _head_fits(self) -> bool:
        if not self.waiting or not self.running.num_free_slots:
            return False
        return self.running.pages_for(self.waiting[0].num_context) <= self._admission_room()

    def _admit(self, draft: _Draft, now_s: float) -> None:
        """Fills `draft` with newcomers until one must wait."""
        room = self._admission_room() if self.waiting else 0
        num_processors = 0
        while self.waiting and self.running.num_free_slots and draft.left > 0:
            seq = self.waiting[0]
            pages = self.running.pages_for(seq.num_context)
            num_processors += seq.request.sampling.has_token_rules
            if pages > room or num_processors > self._max_processor_rows:
                return
            if seq.num_in_flight > 0:  # just preempted: its tokens are not all known yet
                return
            room -= pages + self._config.headroom_pages
            self._enter(draft, seq, now_s)

    def _enter(self, draft: _Draft, seq: Sequence, now_s: float) -> None:
        self.waiting.pop(0)
        self.running.enter(seq)
        if seq.queue_s is None:
            seq.queue_s = now_s - seq.arrival_s
            self._counters.prompt_tokens += len(seq.request.prompt)
        draft.admissions.append(Admission(seq.slot, seq.request, tuple(seq.output)))
        grant = _Grant(seq, first_page=0)
        self._extend(draft, grant, draft.share)
        draft.prompts.append(grant)

    # Memory: by rank, from the end of the running.

    def _grant(self, draft: _Draft, grant: _Grant) -> None:
        """Gives a half computed prompt its share; it preempts only if not one token fits.

        The last in rank waits with what it holds instead of preempting itself.
        """
        self._extend(draft, grant, draft.share)
        while grant.num_tokens == 0 and draft.left > 0:
            last = self.running.sequences[-1]
            if last is grant.seq:
                break
            self._preempt(last)
            self._extend(draft, grant, draft.share)
        draft.prompts.append(grant)

    def _extend(self, draft: _Draft, grant: _Grant, most: int) -> None:
        """Adds up to `most` tokens to `grant`, as the step and the free pages allow."""
        start = grant.seq.num_computed + grant.num_tokens
        end = min(len(grant.seq.context), start + min(most, draft.left))
        end = min(end, self.running.most_positions(grant.seq))
        self.running.grow(grant.seq, end)
        grant.num_tokens += end - start
        draft.left -= end - start

    def _reserve(self, seq: Sequence, new: int) -> bool:
        """Pages for `new` more tokens of `seq`; False if it had to be preempted itself."""
        end = seq.num_computed + new
        while end > seq.capacity and not self.running.grow(seq, end):
            last = self.running.sequences[-1]
            self._preempt(last)
            if last is seq:
                return False
        return True

    def _preempt(self, seq: Sequence) -> None:
        """Takes all from `seq`; tokens in flight still count when their step is committed."""
        self._counters.num_preemptions += 1
        self._counters.recomputed_tokens += seq.num_computed
        self.running.leave(seq)
        self.enqueue(seq)


def _decode_rows(decodes: list[_Decode]) -> Rows:
    chunks: list[Chunk] = []
    for seq, first_page, new in decodes:
        start, pages = seq.num_computed, seq.pages
        grown = (
            (NewPages(0, first_page, tuple(pages[first_page:])),) if len(pages) > first_page else ()
        )
        # `_make` takes half the time of naming the fields, and this runs for every row.
        chunks.append(Chunk._make((seq.slot, seq.id, start, 1, (), new, (), grown)))
        seq.num_computed = start + new
        seq.num_tokens += new
        seq.num_in_flight += 1
    return Rows(chunks, [seq for seq, _, _ in decodes])


def _add_prompt(rows: Rows, grant: _Grant) -> None:
    seq = grant.seq
    start, end = seq.num_computed, seq.num_computed + grant.num_tokens
    max_new = int(end == len(seq.context))
    wants_logprobs = seq.prompt_logprobs is not None
    new_pages = tuple(seq.pages[grant.first_page :])
    rows.chunks.append(
        Chunk(
            slot=seq.slot,
            request_id=seq.id,
            start=start,
            num_tokens=grant.num_tokens,
            tokens=seq.context[start:end],
            max_new=max_new,
            prompt_targets=seq.request.prompt[start + 1 : end + 1] if wants_logprobs else (),
            pages=(NewPages(0, grant.first_page, new_pages),) if new_pages else (),
        )
    )
    rows.sequences.append(seq)
    seq.num_computed = end
    seq.num_tokens += max_new
    seq.num_in_flight += 1
