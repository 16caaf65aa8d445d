"""Builds the next step: decides who is admitted, grows or is preempted, and in which program."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from jserve.cache.kv_cache import AdmissionRoom, KVCache
from jserve.cache.pages import NO_HIT, Hit, PageDelta, joined
from jserve.core.stats import EngineStats
from jserve.core.step import Admission, Chunk, MaskRow, Program, StepPlan
from jserve.scheduler.config import SchedulerConfig
from jserve.scheduler.constraint import Bound
from jserve.scheduler.lifecycle import Lifecycle
from jserve.scheduler.pace import Pace
from jserve.scheduler.policy import decode_steps
from jserve.scheduler.programs import ProgramTable
from jserve.scheduler.sequence import Sequence, SequenceState


@dataclass(slots=True)
class Rows:
    """The rows of a step; row r is entry r of every list."""

    chunks: list[Chunk] = field(default_factory=list[Chunk])
    sequences: list[Sequence] = field(default_factory=list[Sequence])
    masks: list[MaskRow] = field(default_factory=list[MaskRow])  # of some rows, in any order


@dataclass(slots=True)
class Step:
    """A step from its planning to its commit."""

    plan: StepPlan
    rows: Rows
    prompts: tuple[Sequence, ...] = ()  # sequences with a prompt chunk
    planned_s: float = 0.0


# A decode row: its sequence, its new pages, the tokens it yields at most.
_Decode = tuple[Sequence, PageDelta, int]


@dataclass(slots=True)
class _Grant:
    """Prompt tokens of one sequence in the step under construction."""

    seq: Sequence
    num_tokens: int = 0
    pages: PageDelta = ()


@dataclass(slots=True)
class _Draft:
    """A mixed step under construction. Decode rows come first, then prompts by rank."""

    now_s: float
    left: int  # prompt tokens that the step still holds
    share: int  # prompt tokens that one sequence gets before others had theirs
    decodes: list[_Decode] = field(default_factory=list[_Decode])
    prompts: list[_Grant] = field(default_factory=list[_Grant])
    admissions: list[Admission] = field(default_factory=list[Admission])
    num_processors: int = 0  # processor rows of the admissions


class Planner:
    """Decides what the next step runs; `Lifecycle` keeps the states that follow from it.

    Memory goes by rank, across decodes and prompts: a sequence that lacks a page takes it from a
    sequence behind it, which is computed again later, in its old place of the queue. So the first
    in rank always gets on, and every sequence ends.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        *,
        programs: ProgramTable,
        lifecycle: Lifecycle,
        cache: KVCache,
        counters: EngineStats,
        max_processor_rows: int,
        max_model_len: int,
    ) -> None:
        self._config = config
        self._programs = programs
        self._lifecycle = lifecycle
        self._cache = cache
        self._waiting = lifecycle.waiting
        self._running = lifecycle.running
        self._counters = counters
        self._max_processor_rows = max_processor_rows
        self._max_model_len = max_model_len
        self._step_tokens = programs.step_tokens(config.step_tokens)
        self.pace = Pace()

    def plan(self, now_s: float) -> Step | None:
        """Builds the next step, and counts it as done; None if nothing can run."""
        if self._head_fits() or any(map(_needs_mixed, self._running)):
            step = self._mixed_step(now_s)
        else:
            step = self._decode_step(now_s)
        if not step.plan.chunks:
            return None
        step.planned_s = now_s
        self._counters.num_steps += 1
        for seq in step.prompts:  # no earlier: nothing is shared within a step
            self._lifecycle.keep(seq)
        for seq in step.rows.sequences:
            if seq.num_tokens == seq.max_total:  # its last token is in flight: it needs no more
                self._lifecycle.retire(seq)
        return step

    def _decode_step(self, now_s: float) -> Step:
        running = self._running
        bounds = (
            self._programs.max_decode_steps(len(running)),
            self._config.decode_steps,
            self.pace.steps_within(self._config.decode_wait_s),
        )
        steps = decode_steps(
            min(bound for bound in bounds if bound is not None),
            [seq.max_total - seq.num_tokens for seq in running],
            waiting=len(self._waiting) > 0,
        )
        beside_free = any(map(_is_free, running))
        if not beside_free or not all(map(_runs_ahead, running)):
            steps = min(steps, self._config.bound_decode_steps if beside_free else 1)
        while steps > 1 and not self._all_can_grow(steps):
            steps //= 2  # rather a shorter run than a preemption
        grow, is_running = self._cache.grow, SequenceState.RUNNING  # looked up once
        decodes: list[_Decode] = []
        for seq in tuple(running):  # a copy: preemptions change the queue
            left = seq.max_total - seq.num_tokens
            most = steps
            if seq.bound is not None:
                most = seq.bound.may_decode(steps, beside_free=beside_free)
                if not most:
                    continue
            new = left if left < most else most
            end = seq.num_computed + new
            pages = ()
            if end > seq.pages.capacity:  # as for all that were preempted on the way
                if seq.state is not is_running:
                    continue
                pages = grow(seq.pages, end)  # most rows that come here succeed
                if pages is None:
                    pages = self._make_room(seq, end, now_s)
            if pages is not None:
                decodes.append((seq, pages, new))
        rows = issue_decodes(decodes)
        return self._step(self._programs.decode(len(rows.chunks), steps), steps, rows)

    def _step(
        self,
        program: Program,
        num_steps: int,
        rows: Rows,
        admissions: Iterable[Admission] = (),
        prompts: Iterable[Sequence] = (),
    ) -> Step:
        plan = StepPlan(
            step_id=self._counters.num_steps,
            program=program,
            num_steps=num_steps,
            chunks=tuple(rows.chunks),
            admissions=tuple(admissions),
            moves=self._cache.take_moves() if rows.chunks else (),
            masks=tuple(rows.masks),
        )
        return Step(plan, rows, tuple(prompts))

    def _mixed_step(self, now_s: float) -> Step:
        running = self._running
        left = self._step_tokens - sum(not _needs_mixed(seq) for seq in running)
        beside_free = any(map(_is_free, running))
        draft = _Draft(now_s, left=left, share=-(-left // self._config.max_partial_prefills))
        for seq in tuple(running):  # a copy: preemptions change the queue
            pages: PageDelta | None = ()
            if seq.rewound and (pages := self._tell_again(draft, seq)) is None:
                continue
            if seq.num_computed < len(seq.context):
                if seq.state is SequenceState.RUNNING:
                    self._grant(draft, _Grant(seq, pages=pages))
                continue
            if seq.bound is not None and not seq.bound.may_decode(1, beside_free=beside_free):
                continue
            end = seq.num_computed + 1
            if end > seq.pages.capacity:
                pages = self._make_room(seq, end, now_s)
            if pages is not None:
                draft.decodes.append((seq, pages, 1))
        self._admit(draft)
        for grant in draft.prompts:  # tokens that the shares of others left over
            self._extend(draft, grant, draft.left)
        return self._build_mixed(draft)

    def _build_mixed(self, draft: _Draft) -> Step:
        rows = issue_decodes(draft.decodes)
        num_tokens = len(draft.decodes)
        for grant in draft.prompts:
            if grant.num_tokens > 0:
                issue_prompt(rows, grant)
                num_tokens += grant.num_tokens
        if draft.admissions or num_tokens > len(draft.decodes):
            program = self._programs.mixed(num_tokens, len(rows.chunks))
        else:
            program = self._programs.decode(num_tokens, 1)
        prompts = rows.sequences[len(draft.decodes) :]
        return self._step(program, 1, rows, draft.admissions, prompts)

    # Admission takes the next of the queue only, so nobody is overtaken out of turn.

    def _admission_room(self) -> AdmissionRoom:
        """Room that is neither owed to half computed prompts nor kept for growth."""
        running = self._running
        return self._cache.admission_room(
            [(s.pages, len(s.context)) for s in running if s.num_computed < len(s.context)],
            num_running=len(running),
            headroom_pages=self._config.headroom_pages,
            max_tokens=self._max_model_len,
        )

    def _head_fits(self) -> bool:
        if not self._lifecycle.num_free_slots:
            return False
        seq, hit = self._candidate([])
        return seq is not None and self._admission_room().fits(hit, seq.num_context)

    def _candidate(self, passed: list[Sequence]) -> tuple[Sequence | None, Hit]:
        """The sequence to be admitted next and what it finds in memory; None if nobody may be.

        One whose next page another sequence is about to compute is passed over, and added to
        `passed`: soon it finds more. It is not for ever: `max_overtakes` bounds how many are
        admitted before it, and how many are looked at.
        """
        most = self._config.max_overtakes
        while (seq := self._lifecycle.next_waiting(passed)) is not None:
            hit = self._hit(seq)
            if not hit.pending or seq.num_passed >= most:
                return seq, hit
            if len(passed) == most:
                break
            passed.append(seq)
        return None, NO_HIT

    def _hit(self, seq: Sequence) -> Hit:
        """The computed tokens that `seq` finds in memory."""
        if seq.prompt_logprobs is not None:  # they come from computing the prompt
            return NO_HIT
        return self._cache.match(seq.chain)

    def _admission(self, seq: Sequence, hit: Hit) -> tuple[Admission, Hit]:
        """The admission of `seq` to the next free slot, and the hit that it starts with."""
        for usable in (hit, NO_HIT):
            admission = Admission(
                self._lifecycle.next_slot,
                seq.request,
                tuple(seq.output),
                num_computed=usable.num_tokens,
                last_token=seq.output[-1] if seq.resumes_after(usable.num_tokens) else None,
            )
            if admission.history_rows <= self._max_processor_rows:
                break  # else its history fits into no step: it is computed again
        return admission, usable

    def _admit(self, draft: _Draft) -> None:
        """Admits sequences to `draft` until one must wait."""
        if not len(self._waiting):
            return
        room = self._admission_room()
        passed: list[Sequence] = []
        while self._lifecycle.num_free_slots and draft.left > 0:
            seq, hit = self._candidate(passed)
            if seq is None:
                return
            admission, hit = self._admission(seq, hit)
            if not self._has_processors(draft, admission):
                return
            if seq.num_in_flight > 0:  # just preempted: its tokens are not all known yet
                return
            if not room.fits(hit, seq.num_context):
                return
            room.take(hit, seq.num_context)
            self._enter(draft, seq, admission, hit)
            for other in passed:
                other.num_passed += 1
            passed = [other for other in passed if other.num_passed < self._config.max_overtakes]

    def _has_processors(self, draft: _Draft, admission: Admission) -> bool:
        """Whether the step has processor rows left for `admission`."""
        return draft.num_processors + admission.processor_rows <= self._max_processor_rows

    def _tell_again(self, draft: _Draft, seq: Sequence) -> PageDelta | None:
        """Admits a rewound sequence to its own slot, with a page for its next token.

        None if it has no row in this step.
        """
        if seq.state is not SequenceState.RUNNING:
            return None
        admission = Admission(
            seq.slot,
            seq.request,
            tuple(seq.output),
            num_computed=seq.num_computed,
            last_token=seq.output[-1] if seq.resumes_after(seq.num_computed) else None,
        )
        if admission.history_rows > self._max_processor_rows:
            self._preempt(seq, draft.now_s)  # its history fits into no step: it is computed again
            return None
        if not self._has_processors(draft, admission) or draft.left <= 0:
            return None
        pages: PageDelta | None = ()
        if seq.num_computed + 1 > seq.pages.capacity:
            pages = self._make_room(seq, seq.num_computed + 1, draft.now_s)
        if pages is None:
            return None
        _add_admission(draft, admission)
        seq.rewound = False
        if admission.last_token is not None:
            draft.left -= 1
        return pages

    def _enter(self, draft: _Draft, seq: Sequence, admission: Admission, hit: Hit) -> None:
        if seq.queue_s is None:
            self._count_first_admission(seq, hit, draft.now_s)
        self._counters.recomputed_tokens += max(0, seq.num_lost - hit.num_tokens)
        seq.num_lost = 0
        pages = self._lifecycle.admit(seq, hit)
        _add_admission(draft, admission)
        if admission.last_token is not None:
            draft.left -= 1
            more = self._cache.grow(seq.pages, seq.num_computed + 1)
            assert more is not None  # its cost was within the room
            draft.decodes.append((seq, joined(pages, more), 1))
            return
        grant = _Grant(seq, pages=pages)
        self._extend(draft, grant, draft.share)
        draft.prompts.append(grant)

    def _count_first_admission(self, seq: Sequence, hit: Hit, now_s: float) -> None:
        seq.queue_s = now_s - seq.arrival_s
        num_prompt = len(seq.request.prompt)
        self._counters.prompt_tokens += num_prompt
        if self._cache.shares_prefixes and seq.prompt_logprobs is None:
            seq.cached_tokens = min(hit.num_tokens, num_prompt)
            self._counters.prefix_query_tokens += num_prompt
            self._counters.prefix_hit_tokens += seq.cached_tokens

    # Memory goes by rank: the policy's victims rank behind the sequence that lacks a page.

    def _grant(self, draft: _Draft, grant: _Grant) -> None:
        """Gives a half computed prompt its share of tokens; it preempts only if not one token fits.

        A prompt that would be its own victim waits with what it holds instead.
        """
        self._extend(draft, grant, draft.share)
        while grant.num_tokens == 0 and draft.left > 0:
            victim = self._lifecycle.victim(grant.seq)
            if victim is grant.seq:
                break
            self._preempt(victim, draft.now_s)
            self._extend(draft, grant, draft.share)
        draft.prompts.append(grant)

    def _extend(self, draft: _Draft, grant: _Grant, most: int) -> None:
        """Adds up to `most` tokens to `grant`, as the step and the free pages allow."""
        start = grant.seq.num_computed + grant.num_tokens
        end = min(len(grant.seq.context), start + min(most, draft.left))
        end = min(end, self._cache.room(grant.seq.pages))
        grant.pages = joined(grant.pages, self._cache.grow(grant.seq.pages, end) or ())
        grant.num_tokens += end - start
        draft.left -= end - start

    def _make_room(self, seq: Sequence, num_tokens: int, now_s: float) -> PageDelta | None:
        """Takes pages for `num_tokens` tokens of `seq`; None if it was preempted, or has to be."""
        if seq.state is not SequenceState.RUNNING:
            return None
        while (pages := self._cache.grow(seq.pages, num_tokens)) is None:
            victim = self._lifecycle.victim(seq)
            self._preempt(victim, now_s)
            if victim is seq:
                return None
        return pages

    def _all_can_grow(self, steps: int) -> bool:
        """Whether free pages suffice for every running sequence to decode `steps` more tokens."""
        if self._cache.can_all_grow(len(self._running), steps):
            return True
        return self._cache.can_grow(
            (seq.pages, seq.num_computed + min(steps, seq.max_total - seq.num_tokens))
            for seq in self._running
        )

    def _preempt(self, seq: Sequence, now_s: float) -> None:
        self._counters.num_preemptions += 1
        seq.num_lost = seq.num_computed
        self._lifecycle.preempt(seq, now_s)


def issue_decodes(decodes: list[_Decode]) -> Rows:
    """Makes the rows of `decodes`, and counts their tokens as computed and in flight."""
    chunks: list[Chunk] = []
    masks: list[MaskRow] = []
    for seq, pages, new in decodes:
        if seq.bound is not None:
            _mask(seq, seq.bound, masks)
        start = seq.num_computed
        # `_make` takes half the time of naming the fields, and this runs for every row.
        chunks.append(Chunk._make((seq.slot, seq.id, start, 1, (), new, (), pages, ())))
        seq.num_computed = start + new
        seq.num_tokens += new
        seq.num_in_flight += 1
    return Rows(chunks, [seq for seq, _, _ in decodes], masks)


def _mask(seq: Sequence, bound: Bound, masks: list[MaskRow]) -> None:
    """Adds the mask of a row that yields tokens of `seq`, if it is known and not everything."""
    if (mask := bound.issue()) is not None:
        masks.append(MaskRow(seq.slot, mask))


def _is_free(seq: Sequence) -> bool:
    return seq.bound is None or seq.bound.mask is None


def _runs_ahead(seq: Sequence) -> bool:
    return seq.bound is None or seq.bound.runs_ahead


def _needs_mixed(seq: Sequence) -> bool:
    """Whether the next row of the running `seq` is more than a decode row."""
    return seq.num_computed < len(seq.context) or seq.rewound


def _add_admission(draft: _Draft, admission: Admission) -> None:
    draft.admissions.append(admission)
    draft.num_processors += admission.processor_rows


def issue_prompt(rows: Rows, grant: _Grant) -> None:
    """Adds the chunk of `grant` to `rows`, and counts its tokens as computed and in flight."""
    seq = grant.seq
    start, end = seq.num_computed, seq.num_computed + grant.num_tokens
    max_new = int(end == len(seq.context))
    wants_logprobs = seq.prompt_logprobs is not None
    rows.chunks.append(
        Chunk(
            slot=seq.slot,
            request_id=seq.id,
            start=start,
            num_tokens=grant.num_tokens,
            tokens=seq.context[start:end],
            max_new=max_new,
            prompt_targets=seq.request.prompt[start + 1 : end + 1] if wants_logprobs else (),
            pages=grant.pages,
        )
    )
    rows.sequences.append(seq)
    if max_new and seq.bound is not None:
        _mask(seq, seq.bound, rows.masks)
    seq.num_computed = end
    seq.num_tokens += max_new
    seq.num_in_flight += 1
