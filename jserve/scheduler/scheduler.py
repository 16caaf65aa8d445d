"""The scheduler takes requests and results, and makes plans and updates. No device, no I/O."""

from collections import deque
from dataclasses import replace

from jserve.cache.kv_cache import KVCache
from jserve.core.errors import EngineError, Overloaded, PromptTooLong, RequestError, Unavailable
from jserve.core.logprobs import PackedLogprobs
from jserve.core.request import FinishReason, Request, SequenceUpdate
from jserve.core.stats import EngineStats
from jserve.core.step import Program, ProgramKind, RowLogprobs, StepPlan, StepResult
from jserve.scheduler import logprobs
from jserve.scheduler.audit import Audit, audit
from jserve.scheduler.config import SchedulerConfig
from jserve.scheduler.constraint import Bound, Constraint
from jserve.scheduler.lifecycle import Lifecycle
from jserve.scheduler.planner import Planner, Step
from jserve.scheduler.policy import FIRST_COME_FIRST_SERVED, Policy
from jserve.scheduler.programs import ProgramTable
from jserve.scheduler.sequence import Sequence, SequenceState
from jserve.scheduler.stats import FinishRate

_FINISH_REASONS = (None, FinishReason.STOP, FinishReason.LENGTH)  # by FinishCode


class Scheduler:
    """Schedules each step anew, with chunked prompts over paged memory. One thread, one owner.

    There are no phases: each step lets the computed tokens of a sequence catch up with its tokens.
    Steps are planned before the results of those in flight are known, and committed in order.

    Orca (OSDI'22): sequences join and leave at every step. Sarathi-Serve (OSDI'24): decodes go
    first in a mixed step and are never stalled by a prompt. PagedAttention (SOSP'23): pages on
    demand; when they run out, the sequence of the last rank is preempted and computed again later.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        *,
        cache: KVCache,
        num_slots: int,
        max_model_len: int,
        programs: tuple[Program, ...],
        max_processor_rows: int = 8,
        policy: Policy = FIRST_COME_FIRST_SERVED,
        eos_token_ids: tuple[int, ...] = (),
    ) -> None:
        """`max_processor_rows` is how many processor rows the admissions of one step can take.

        An admission with masks or biases takes one; one with penalties and computed tokens takes
        as many as its history needs.

        Raises:
            ConfigError: the programs or `config.step_tokens` cannot hold every slot.
        """
        self._config = config
        self._max_model_len = max_model_len
        self._eos_token_ids = eos_token_ids
        self._counters = EngineStats()
        self._finish_rate = FinishRate()
        self._cache = cache
        self._lifecycle = Lifecycle(policy, cache, num_slots)
        self._planner = Planner(
            config,
            programs=ProgramTable(programs, num_slots),
            lifecycle=self._lifecycle,
            cache=cache,
            counters=self._counters,
            max_processor_rows=max_processor_rows,
            max_model_len=max_model_len,
        )
        self._live: dict[str, Sequence] = {}
        self._in_flight: deque[Step] = deque()
        self._num_arrivals = 0
        self._draining = False

    # Requests in and out.

    def add(self, request: Request, now_s: float, constraint: Constraint | None = None) -> None:
        """Queues `request`. Its `output` is replayed as after a preemption.

        A `constraint` has taken that output already.

        Raises:
            PromptTooLong: it can never fit, however idle the engine.
            RequestError: its id is in use, the prompt, max_tokens or what is left of it is 0, or
                the constraint leaves no token.
            Overloaded: the queue is full, and `request` is not resumed.
            Unavailable: the engine drains.
        """
        max_total = self._checked_max_total(request)
        if self._draining:
            raise Unavailable("the engine is draining; send to another", retry_after_s=1.0)
        num_waiting = len(self._lifecycle.waiting)
        if num_waiting >= self._config.max_queue and not request.resumed:
            raise Overloaded(
                f"the queue is full with {num_waiting} waiting sequences; try again later",
                retry_after_s=self._finish_rate.drain_s(
                    num_waiting, self._config.max_retry_after_s
                ),
            )
        output = list(request.output)
        seq = Sequence(
            id=request.id,
            request=_with_limit(request, max_total),
            arrival=self._num_arrivals,
            arrival_s=now_s,
            max_total=max_total,
            chain=self._cache.chain(request, output),
            output=output,
        )
        if request.output:  # its first update went out with the first of these
            seq.reported, seq.plain = True, request.sampling.logprobs is None
        elif request.sampling.prompt_logprobs is not None:
            seq.prompt_logprobs = PackedLogprobs([None])
        if constraint is not None:
            seq.bound = Bound(constraint, request.sampling, len(output), self._eos_token_ids)
        self._num_arrivals += 1
        self._live[request.id] = seq
        self._lifecycle.arrive(seq, now_s)

    def _checked_max_total(self, request: Request) -> int:
        prompt = len(request.prompt)
        if request.id in self._live:
            raise RequestError(f"request id {request.id!r} is in use; choose another", param="id")
        if prompt == 0:
            raise RequestError("the prompt is empty; send at least one token", param="prompt")
        if request.sampling.max_tokens < 1:
            raise RequestError(
                f"max_tokens is {request.sampling.max_tokens}; it must be at least 1",
                param="max_tokens",
            )
        if len(request.output) >= request.sampling.max_tokens:
            raise RequestError(
                f"output has {len(request.output)} tokens, and max_tokens is "
                f"{request.sampling.max_tokens}: nothing is left to do",
                param="output",
            )
        if prompt + len(request.output) + 1 > self._max_model_len:
            raise PromptTooLong(
                f"the prompt has {prompt} tokens; with {len(request.output) + 1} of output it "
                f"exceeds the context of {self._max_model_len}; shorten it",
                param="prompt",
            )
        max_total = min(prompt + request.sampling.max_tokens, self._max_model_len)
        pages = self._cache.pages_for(max_total - 1)  # the last token is never computed
        if pages > self._cache.num_pages:
            raise PromptTooLong(
                f"prompt and output of {max_total} tokens need {pages} pages of KV memory, the "
                f"engine has {self._cache.num_pages}; shorten the prompt or lower max_tokens",
                param="max_tokens",
            )
        return max_total

    @property
    def num_live(self) -> int:
        """Number of sequences that wait or run."""
        return len(self._live)

    def is_live(self, request_id: str) -> bool:
        """Whether the sequence waits or runs."""
        return request_id in self._live

    def abort(self, request_id: str) -> bool:
        """Drops a sequence and frees what it holds; results in flight for it are discarded.

        False if no such sequence lives; then nothing happens.
        """
        seq = self._live.get(request_id)
        if seq is None:
            return False
        self._end(seq)
        self._counters.num_aborted += 1
        return True

    def drain(self) -> None:
        """Accepts nothing new from now on; what was accepted is finished."""
        self._draining = True

    def fail_all(self, message: str) -> list[SequenceUpdate]:
        """Ends every sequence with `message` after the engine failed; forgets steps in flight.

        The cache may name pages whose steps never ran: this scheduler must not serve again.
        """
        self._in_flight.clear()
        updates: list[SequenceUpdate] = []
        for seq in list(self._live.values()):
            self._end(seq)
            updates.append(SequenceUpdate(seq.id, (), finish=FinishReason.ERROR, error=message))
        return updates

    @property
    def has_work(self) -> bool:
        """Whether any sequence waits, runs or is in flight."""
        return bool(self._live)

    @property
    def num_in_flight(self) -> int:
        """Steps planned but not committed."""
        return len(self._in_flight)

    def stats(self) -> EngineStats:
        """A copy of the counters with the present gauges."""
        num_waiting = len(self._lifecycle.waiting)
        return replace(
            self._counters,
            num_waiting=num_waiting,
            num_running=len(self._live) - num_waiting,
            free_slots=self._lifecycle.num_free_slots,
            free_pages=self._cache.num_free,
            cached_pages=self._cache.num_cached,
            prefix_evicted_pages=self._cache.num_evicted,
        )

    def audit(self) -> Audit:
        """Copies all bookkeeping and lists what is wrong with it; for tests and debugging."""
        return audit(self._live.values(), self._lifecycle, self._cache)

    # Before a step.

    def plan(self, now_s: float) -> StepPlan | None:
        """Plans the step to be submitted next; None if nothing can run before a commit."""
        step = self._planner.plan(now_s)
        if step is None:
            return None
        self._in_flight.append(step)
        return step.plan

    # After a step.

    def commit(self, plan: StepPlan, result: StepResult, now_s: float) -> list[SequenceUpdate]:
        """Applies the result of the oldest step in flight; returns what clients must be told.

        Tokens past a finish or an abort are dropped. A row may yield fewer tokens than planned.

        Raises:
            EngineError: the device broke the contract of `StepResult`.
            ValueError: `plan` is not the oldest in flight, or `result` is of another step.
        """
        if not self._in_flight or self._in_flight[0].plan is not plan:
            raise ValueError(f"step {plan.step_id} is not the oldest in flight")
        if result.step_id != plan.step_id:
            raise ValueError(f"step {plan.step_id} got the result of step {result.step_id}")
        step = self._in_flight.popleft()
        if result.landed:
            self._cache.landed(result.landed)
        if result.prompt_logprobs is not None:
            _collect_prompt_logprobs(step, result.prompt_logprobs)
        tokens: list[list[int]] = result.tokens.tolist()
        num_new: list[int] = result.num_new.tolist()
        codes: list[int] = result.finish.tolist()
        _check_rows(num_new, codes)
        is_decode = plan.program.kind is ProgramKind.DECODE
        self._planner.pace.committed(step.planned_s, now_s, max(num_new) if is_decode else 0)
        updates: list[SequenceUpdate] = []
        num_output = 0
        chunks = plan.chunks
        running, finished = SequenceState.RUNNING, SequenceState.FINISHED  # looked up once
        for row, seq in enumerate(step.rows.sequences):
            seq.num_in_flight -= 1
            state = seq.state
            if state is finished:
                continue
            num, new = num_new[row], tokens[row]
            if num != len(new):
                new = new[:num]
            finish = _FINISH_REASONS[codes[row]]
            error = None
            if seq.bound is not None:
                accepted = self._accept(seq, seq.bound, chunks[row].max_new, new, finish, now_s)
                if accepted is None:
                    continue
                new, finish, error = accepted
            else:
                seq.output += new
            num_output += len(new)
            if finish is not None:
                if num > chunks[row].max_new:
                    raise EngineError(
                        f"request {seq.id}: the device gave {num} tokens, at most "
                        f"{chunks[row].max_new} were planned"
                    )
                self._end(seq)
                self._counters.num_finished += 1
                self._finish_rate.record(now_s)
            elif seq.rewound or seq.state is not state:
                pass  # its constraint has set where it goes on
            elif state is not running or num != chunks[row].max_new:
                self._settle(seq, chunks[row].max_new - num, now_s)
            if len(seq.output) >= seq.keep_output and seq.state is running:
                self._lifecycle.keep(seq)
            if not new and finish is None:
                continue
            if seq.plain:
                updates.append(SequenceUpdate(seq.id, tuple(new), finish, error=error))
            else:
                if not seq.reported and finish is None:
                    self._lifecycle.note_first_output(seq, now_s)
                update = _full_update(seq, row, new, finish, result)
                updates.append(update if error is None else update._replace(error=error))
        self._counters.output_tokens += num_output
        return updates

    def _accept(
        self,
        seq: Sequence,
        bound: Bound,
        max_new: int,
        new: list[int],
        finish: FinishReason | None,
        now_s: float,
    ) -> tuple[list[int], FinishReason | None, str | None] | None:
        """Adds those of a row's tokens that stand; returns them, and the end that they make.

        None for a row that was planned behind a token which does not stand. The last entry is why
        the constraint can't go on, where that is the end.
        """
        if bound.num_stale > 0:
            bound.num_stale -= 1
            return None
        if not max_new:  # tokens of the prompt
            return new, finish, None
        try:
            stand = bound.accept(new)
            is_cut = stand < len(new)
            if is_cut:
                new, finish = new[:stand], None
            seq.output += new
            if finish is not None:
                return new, finish, None
            if bound.num_unknown and bound.mask is not None and bound.runs_ahead and not is_cut:
                return new, None, None  # the next row is planned without it
            if not bound.next_mask():
                return new, FinishReason.STOP, None
            forced = self._force(seq, bound)
        except RequestError as error:
            return [], FinishReason.ERROR, str(error)
        if is_cut or forced or (bound.num_unknown and not bound.runs_ahead):
            self._go_on_after_output(seq, bound, len(forced), now_s)
        return [*new, *forced], None, None

    def _force(self, seq: Sequence, bound: Bound) -> list[int]:
        """Adds the tokens that must come next to the output, but for the last that it may have."""
        if seq.state is not SequenceState.RUNNING:
            return []
        forced = bound.force(seq.max_total - len(seq.request.prompt) - len(seq.output) - 1)
        seq.output += forced
        return forced

    def _go_on_after_output(
        self, seq: Sequence, bound: Bound, num_forced: int, now_s: float
    ) -> None:
        bound.drop_rows(seq.num_in_flight)
        if seq.state is SequenceState.RUNNING:
            self._lifecycle.rewind(seq, num_forced)
        elif seq.state is SequenceState.RETIRED:
            self._lifecycle.requeue(seq, now_s)

    def _settle(self, seq: Sequence, shortfall: int, now_s: float) -> None:
        """Corrects the counts of a sequence that got `shortfall` tokens less than planned."""
        if shortfall < 0 or len(seq.request.prompt) + len(seq.output) >= seq.max_total:
            raise EngineError(
                f"request {seq.id}: the device ran past the limit of {seq.max_total} tokens"
            )
        if shortfall == 0:
            return
        if seq.state is SequenceState.RUNNING:
            seq.num_tokens -= shortfall
            seq.num_computed -= shortfall
        elif seq.state is SequenceState.RETIRED:
            self._lifecycle.requeue(seq, now_s)

    def _end(self, seq: Sequence) -> None:
        self._lifecycle.finish(seq)
        del self._live[seq.id]


def _with_limit(request: Request, max_total: int) -> Request:
    """Limits `max_tokens` to what the context leaves, so that the device stops there."""
    most = max_total - len(request.prompt)
    if request.sampling.max_tokens == most:
        return request
    return replace(request, sampling=replace(request.sampling, max_tokens=most))


def _check_rows(num_new: list[int], codes: list[int]) -> None:
    """Raises EngineError for what no row may yield; for all rows at once, since it runs per step.

    Tokens past those planned are found row by row, where a count differs from the plan.
    """
    if min(num_new) < 0:
        raise EngineError(f"the device gave a row of {min(num_new)} tokens")
    if min(codes) < 0 or max(codes) >= len(_FINISH_REASONS):
        code = next(code for code in codes if not 0 <= code < len(_FINISH_REASONS))
        raise EngineError(f"the device gave a row the finish code {code}")


def _full_update(
    seq: Sequence, row: int, new: list[int], finish: FinishReason | None, result: StepResult
) -> SequenceUpdate:
    """Makes an update with log-probabilities, or the first one with what is reported once."""
    num_top = seq.request.sampling.logprobs
    if num_top is not None and result.logprobs is None:
        raise EngineError(f"request {seq.id}: the step came without log-probabilities")
    of_tokens = (
        None
        if num_top is None or result.logprobs is None
        else logprobs.token_records(result.logprobs, row, new, num_top)
    )
    if seq.reported:
        return SequenceUpdate(seq.id, tuple(new), finish, of_tokens)
    seq.reported = True
    seq.plain = num_top is None
    of_prompt, seq.prompt_logprobs = seq.prompt_logprobs, None
    if of_prompt is not None and len(of_prompt) != len(seq.request.prompt):
        raise EngineError(f"request {seq.id}: prompt log-probabilities are missing")
    return SequenceUpdate(
        seq.id,
        tuple(new),
        finish,
        logprobs=of_tokens,
        prompt_logprobs=of_prompt,
        queue_s=seq.queue_s,
        cached_tokens=seq.cached_tokens,
    )


def _collect_prompt_logprobs(step: Step, rows: RowLogprobs) -> None:
    """Stores the prompt log-probabilities of a step; of a recomputation only those not known."""
    first = 0
    for chunk, seq in zip(step.rows.chunks, step.rows.sequences, strict=True):
        num_top = seq.request.sampling.prompt_logprobs
        if chunk.prompt_targets and num_top is not None and seq.prompt_logprobs is not None:
            num_known = len(seq.prompt_logprobs) - (chunk.start + 1)
            if num_known < 0:
                raise EngineError(f"request {seq.id}: prompt log-probabilities are missing")
            if num_known < len(chunk.prompt_targets):
                new = chunk.prompt_targets[num_known:]
                seq.prompt_logprobs.extend(
                    logprobs.prompt_records(rows, first + num_known, new, num_top)
                )
        first += chunk.num_tokens
