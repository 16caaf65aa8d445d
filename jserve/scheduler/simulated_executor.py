"""A device that is not there: runs plans on the hash model, and refuses plans that break the rules.

It keeps what a real device keeps (slots, page tables, paged KV memory) and nothing else, so that
a plan which is wrong gives wrong tokens, or a `PlanError`. A mask replaces a token that it forbids
by the next one that it allows. Adapters, drafts and a second page group are refused: their effect
on tokens is not simulated.
"""

from dataclasses import dataclass, field

import numpy as np

from jserve.core.request import MAX_LOGPROBS, Request, TokenLogprobs
from jserve.core.step import (
    Admission,
    Chunk,
    FinishCode,
    MaskRow,
    Program,
    ProgramKind,
    RowLogprobs,
    StepPlan,
    StepResult,
    mask_words,
    page_entries,
)
from jserve.scheduler.simulated_model import EMPTY_DIGEST, SimulatedModel, allows, extend
from jserve.scheduler.simulated_pages import PlanError, SimulatedPages, require


@dataclass(slots=True, eq=False)
class _Slot:
    """One stay of a sequence in a slot, as the device knows it."""

    request: Request
    context: tuple[int, ...]  # tokens that its chunks must bring
    stops: frozenset[int]
    pages: list[int] = field(default_factory=list[int])
    writers: list[object] = field(
        default_factory=list[object]
    )  # the writer of each page when it was received
    num_computed: int = 0
    last_token: int | None = None  # sampled, not computed yet
    frozen: bool = False
    starts: bool = True  # its first row has not run


class SimulatedExecutor:
    """An `Executor` without a device; deterministic, each step done when submitted. One thread."""

    def __init__(
        self,
        programs: tuple[Program, ...],
        *,
        num_slots: int,
        num_pages: int,
        page_size: int,
        model: SimulatedModel,
        max_processor_rows: int = 8,
        pages_per_slot: int | None = None,
        num_host_pages: int = 0,
    ) -> None:
        """`pages_per_slot` bounds the pages of a plan; by default a sequence may have them all."""
        self._programs = programs
        self._model = model
        self._max_processor_rows = max_processor_rows
        self._slots: list[_Slot | None] = [None] * num_slots
        self._pages_per_slot = pages_per_slot or num_pages
        self._memory = SimulatedPages(num_pages, page_size, num_host_pages)
        self._num_steps = 0
        self._pending: list[StepResult] = []

    def submit(self, plan: StepPlan) -> StepResult:
        """Runs a step at once. Raises `PlanError` for a plan that breaks the contract."""
        require(plan.step_id == self._num_steps, f"step {plan.step_id} is out of order")
        self._num_steps += 1
        self._check_shape(plan)
        outcome = _Outcome(plan, self._memory.move(plan.moves))
        self._admit(plan)
        # Every row sees memory as the steps before left it, and its own writes.
        slots = [self._checked_slot(chunk) for chunk in plan.chunks]
        for slot, chunk in zip(slots, plan.chunks, strict=True):
            self._add_pages(slot, chunk)
        for row, (slot, chunk) in enumerate(zip(slots, plan.chunks, strict=True)):
            self._check_pages(slot, chunk)
            if chunk.tokens:
                self._run_prompt(slot, chunk, row, outcome)
            else:
                self._run_decode(slot, chunk, plan.num_steps, row, outcome)
            outcome.first_token += chunk.num_tokens
        self._pending.append(outcome.result())
        return self._pending[-1]

    def collect(self, handle: StepResult) -> StepResult:
        """Returns the result of the oldest step."""
        require(self._pending[0] is handle, f"step {handle.step_id} is collected out of order")
        self._memory.land(handle.landed)
        return self._pending.pop(0)

    # Checks of a plan.

    def _check_shape(self, plan: StepPlan) -> None:
        program, chunks = plan.program, plan.chunks
        name = f"step {plan.step_id}, {program.name}"
        require(program in self._programs, f"{name}: no such program")
        require(0 < len(chunks) <= program.rows, f"{name}: {len(chunks)} rows")
        require(1 <= plan.num_steps <= program.steps, f"{name}: {plan.num_steps} steps")
        num_tokens = sum(chunk.num_tokens for chunk in chunks)
        require(num_tokens <= program.tokens, f"{name}: {num_tokens} tokens")
        slots = {chunk.slot for chunk in chunks}
        require(len(slots) == len(chunks), f"{name}: a slot has two rows")
        decodes = [not chunk.tokens for chunk in chunks]
        require(decodes == sorted(decodes, reverse=True), f"{name}: decode rows come first")
        if program.kind is ProgramKind.DECODE:
            require(all(decodes) and not plan.admissions, f"{name}: a decode program only decodes")
        admitted = {admission.slot for admission in plan.admissions}
        require(len(admitted) == len(plan.admissions), f"{name}: a slot is admitted twice")
        require(admitted <= slots, f"{name}: an admission without a chunk")
        rows = sum(admission.processor_rows for admission in plan.admissions)
        require(rows <= self._max_processor_rows, f"{name}: {rows} processor rows")
        entries = page_entries(program, self._memory.page_size, self._pages_per_slot)
        pages = sum(len(new.ids) for chunk in chunks for new in chunk.pages)
        require(pages <= entries, f"{name}: {pages} new pages, more than {entries}")
        require(not any(chunk.drafts for chunk in chunks), f"{name}: drafts")
        masked = {mask.slot for mask in plan.masks}
        require(masked <= slots, f"{name}: a mask without a row")
        require(len(masked) == len(plan.masks), f"{name}: a slot has two masks")
        for mask in plan.masks:
            self._check_mask(mask, name)

    def _check_mask(self, mask: MaskRow, name: str) -> None:
        words, vocab = mask.words, self._model.vocab
        require(len(words) == 4 * mask_words(vocab), f"{name}: a mask of {len(words)} bytes")
        require(any(allows(words, token) for token in range(vocab)), f"{name}: a mask of nothing")

    def _admit(self, plan: StepPlan) -> None:
        fresh = {chunk.slot for chunk in plan.chunks if any(new.first == 0 for new in chunk.pages)}
        for admission in plan.admissions:
            require(0 <= admission.slot < len(self._slots), f"no slot {admission.slot}")
            before, slot = self._slots[admission.slot], self._new_slot(admission)
            if before and before.request.id == slot.request.id and admission.slot not in fresh:
                slot.pages, slot.writers = before.pages, before.writers
            self._slots[admission.slot] = slot

    def _new_slot(self, admission: Admission) -> _Slot:
        request = admission.request
        require(not admission.adapter, f"{request.id}: adapter {admission.adapter}")
        context = request.prompt + admission.output
        require(all(0 <= t < self._model.vocab for t in context), f"{request.id}: bad token id")
        most = request.sampling.max_tokens
        require(len(admission.output) < most, f"{request.id}: admitted when it had ended")
        last, computed = admission.last_token, admission.num_computed
        require(
            0 <= computed < len(context), f"{request.id}: {computed} of {len(context)} computed"
        )
        if last is not None:
            require(admission.output[-1:] == (last,), f"{request.id}: {last} is no last token")
            require(
                computed == len(context) - 1, f"{request.id}: not all are computed but the last"
            )
        stops = self._model.stop_ids(request)
        return _Slot(request, context, stops, num_computed=computed, last_token=last)

    def _checked_slot(self, chunk: Chunk) -> _Slot:
        slot = self._slots[chunk.slot] if 0 <= chunk.slot < len(self._slots) else None
        if slot is None:
            raise PlanError(f"{chunk.request_id}: nobody was admitted to slot {chunk.slot}")
        require(
            slot.request.id == chunk.request_id,
            f"slot {chunk.slot} holds {slot.request.id}, not {chunk.request_id}",
        )
        return slot

    def _add_pages(self, slot: _Slot, chunk: Chunk) -> None:
        """Appends to the slot's table. Pages of computed tokens are shared, the others its own."""
        name = f"{chunk.request_id} in slot {chunk.slot}"
        memory, size = self._memory, self._memory.page_size
        for group, first, ids in chunk.pages:
            require(group == 0, f"{name}: no page group {group}")
            require(first == len(slot.pages), f"{name}: a gap or overlap in its page table")
            for page in ids:
                require(memory.has(page), f"{name}: no page {page}")
                start = len(slot.pages) * size
                if start + size > slot.num_computed:
                    if start < slot.num_computed:
                        self._check_half_filled(slot, page)
                    memory.give(page, slot)
                slot.pages.append(page)
                slot.writers.append(memory.writer(page))
        require(len(set(slot.pages)) == len(slot.pages), f"{name}: a page twice")
        if slot.starts:
            slot.starts = False
            self._check_content(slot)

    def _check_half_filled(self, slot: _Slot, page: int) -> None:
        """A page that the slot will go on filling has no other who fills it."""
        other = self._memory.writer(page)
        if isinstance(other, _Slot) and other.request.id != slot.request.id:
            fills = other in self._slots and not other.frozen
            require(
                not fills,
                f"{slot.request.id}: starts inside of page {page}, which {other.request.id} fills",
            )

    def _check_content(self, slot: _Slot) -> None:
        """The pages of a sequence that starts hold what its computed tokens make."""
        digest = EMPTY_DIGEST
        for position in range(slot.num_computed):
            digest = extend(digest, slot.context[position])
            page = self._page(slot, position)
            require(
                self._memory.read(slot.pages, position) == digest,
                f"{slot.request.id}: page {page} does not hold its token {position}",
            )

    def _check_pages(self, slot: _Slot, chunk: Chunk) -> None:
        for page, writer in zip(slot.pages, slot.writers, strict=True):
            require(
                self._memory.writer(page) is writer,
                f"{chunk.request_id} in slot {chunk.slot}: page {page} was given to another",
            )

    # The device's work.

    def _run_prompt(self, slot: _Slot, chunk: Chunk, row: int, outcome: "_Outcome") -> None:
        name = f"{chunk.request_id}: chunk at {chunk.start}"
        prompt, end = slot.request.prompt, chunk.start + chunk.num_tokens
        require(chunk.start == slot.num_computed, f"{name}, {slot.num_computed} are computed")
        require(chunk.tokens == slot.context[chunk.start : end], f"{name}: wrong tokens")
        require(len(chunk.tokens) == chunk.num_tokens, f"{name}: wrong number of tokens")
        samples = end == len(slot.context)
        require(chunk.max_new == samples, f"{name}: samples too soon or late")
        targets = prompt[chunk.start + 1 : end + 1]
        require(chunk.prompt_targets in ((), targets), f"{name}: wrong targets")
        digest = EMPTY_DIGEST
        for i, token in enumerate(chunk.tokens):
            digest = self._compute(slot, token)
            if i < len(chunk.prompt_targets):
                logprobs = self._model.logprobs(digest, targets[i])
                outcome.add_prompt_logprobs(outcome.first_token + i, logprobs)
        if samples:
            self._sample(slot, digest, row, outcome)

    def _run_decode(
        self, slot: _Slot, chunk: Chunk, num_steps: int, row: int, outcome: "_Outcome"
    ) -> None:
        if slot.frozen:  # planned before its finish was known
            return
        name = f"{chunk.request_id}: decode at {chunk.start}"
        require(chunk.start == slot.num_computed, f"{name}, {slot.num_computed} are computed")
        require(chunk.num_tokens == 1, f"{name}: not one token")
        require(
            1 <= chunk.max_new <= num_steps, f"{name}: {chunk.max_new} tokens in {num_steps} steps"
        )
        for _ in range(chunk.max_new):
            if slot.last_token is None:
                raise PlanError(f"{name}: nothing was sampled before")
            self._sample(slot, self._compute(slot, slot.last_token), row, outcome)
            if slot.frozen:
                return

    def _compute(self, slot: _Slot, token: int) -> int:
        """Writes the next position of KV memory from the one before, both through the table."""
        position = slot.num_computed
        self._page(slot, position)
        before = self._memory.read(slot.pages, position - 1) if position > 0 else EMPTY_DIGEST
        digest = extend(before, token)
        self._memory.write(slot.pages, position, digest)
        slot.num_computed += 1
        return digest

    def _page(self, slot: _Slot, position: int) -> int:
        index = position // self._memory.page_size
        require(index < len(slot.pages), f"{slot.request.id}: no page for position {position}")
        return slot.pages[index]

    def _sample(self, slot: _Slot, digest: int, row: int, outcome: "_Outcome") -> None:
        num_output = slot.num_computed - len(slot.request.prompt)
        token = self._model.sample(digest, slot.request, num_output, outcome.masks.pop(row, None))
        sampling = slot.request.sampling
        code = FinishCode.RUNNING
        if token in slot.stops and num_output + 1 > sampling.min_tokens:
            code = FinishCode.STOP
        elif num_output + 1 == sampling.max_tokens:
            code = FinishCode.LENGTH
        wanted = sampling.logprobs is not None
        logprobs = self._model.logprobs(digest, token) if wanted else None
        outcome.add_token(row, token, code, logprobs)
        slot.last_token = token
        slot.frozen = code is not FinishCode.RUNNING


class _Outcome:
    """A `StepResult` that is filled row by row."""

    def __init__(self, plan: StepPlan, landed: tuple[int, ...]) -> None:
        self._landed = landed
        self.first_token = 0  # ragged index of the present row's first token
        self._plan = plan
        of_slot = {mask.slot: mask.words for mask in plan.masks}
        self.masks = {  # words by row, for its first token
            row: of_slot[chunk.slot]
            for row, chunk in enumerate(plan.chunks if of_slot else ())
            if chunk.slot in of_slot
        }
        self._tokens = np.zeros((plan.program.rows, plan.program.steps), np.int32)
        self._num_new = np.zeros(plan.program.rows, np.int32)
        self._finish = np.zeros(plan.program.rows, np.int32)
        self._logprobs: RowLogprobs | None = None
        self._prompt_logprobs: RowLogprobs | None = None

    def add_token(
        self, row: int, token: int, code: FinishCode, logprobs: TokenLogprobs | None
    ) -> None:
        """One more token of `row`."""
        step = int(self._num_new[row])
        self._tokens[row, step] = token
        self._num_new[row] += 1
        self._finish[row] = code
        if logprobs is not None:
            self._logprobs = self._logprobs or _no_logprobs(*self._tokens.shape)
            _store(self._logprobs, row, step, logprobs)

    def add_prompt_logprobs(self, ragged: int, logprobs: TokenLogprobs) -> None:
        """Adds the log-probabilities of the prompt token after ragged token `ragged`."""
        self._prompt_logprobs = self._prompt_logprobs or _no_logprobs(self._plan.program.tokens, 1)
        _store(self._prompt_logprobs, ragged, 0, logprobs)

    def result(self) -> StepResult:
        """All that was added."""
        return StepResult(
            self._plan.step_id,
            self._tokens,
            self._num_new,
            self._finish,
            self._logprobs,
            self._prompt_logprobs,
            self._landed,
        )


def _no_logprobs(rows: int, steps: int) -> RowLogprobs:
    return RowLogprobs(
        np.zeros((rows, steps), np.float32),
        np.zeros((rows, steps), np.int32),
        np.zeros((rows, steps, MAX_LOGPROBS), np.int32),
        np.zeros((rows, steps, MAX_LOGPROBS), np.float32),
    )


def _store(rows: RowLogprobs, row: int, step: int, logprobs: TokenLogprobs) -> None:
    rows.token[row, step] = logprobs.logprob
    rows.rank[row, step] = logprobs.rank
    rows.top_ids[row, step] = [token for token, _ in logprobs.top]
    rows.top[row, step] = [value for _, value in logprobs.top]
