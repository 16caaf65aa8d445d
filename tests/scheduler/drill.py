"""Random orders to a scheduler on a simulated device; each answer is checked by content."""

import random
from collections import Counter
from dataclasses import dataclass

from hypothesis import strategies as st

from jserve.cache.kv_cache import KVCache
from jserve.cache.layout import single_group
from jserve.core.errors import Overloaded, PromptTooLong
from jserve.core.request import Request, SamplingParams, SequenceUpdate, TokenLogprobs
from jserve.core.step import Admission, Program, ProgramKind, StepPlan
from jserve.engine.pipeline import Pipeline
from jserve.scheduler.audit import Audit, SequenceRecord
from jserve.scheduler.config import SchedulerConfig
from jserve.scheduler.scheduler import Scheduler
from jserve.scheduler.sequence import SequenceState
from jserve.scheduler.simulated_executor import SimulatedExecutor
from jserve.scheduler.simulated_model import EMPTY_DIGEST, SimulatedModel, extend
from tests.scheduler.sharing_cache import SharingCache
from tests.scheduler.swapping_cache import SwappingCache

# 3 % of tokens stop: sequences end in every way, and many grow long.
MODEL = SimulatedModel(vocab=64, eos_token_ids=(1, 5))


@dataclass(frozen=True)
class Engine:
    """The sizes of one engine."""

    num_slots: int
    num_pages: int
    page_size: int
    max_model_len: int
    programs: tuple[Program, ...]
    max_processor_rows: int
    config: SchedulerConfig


@st.composite
def engines(draw: st.DrawFn) -> Engine:
    slots = draw(st.sampled_from((1, 2, 4, 5, 8)))
    small, more = draw(st.integers(1, 24)), draw(st.integers(0, 24))
    decodes = draw(st.lists(st.tuples(st.integers(1, slots), st.integers(1, 8)), max_size=2))
    if draw(st.booleans()):
        decodes.append((slots, draw(st.integers(1, 8))))
    page_size, max_model_len = draw(st.integers(1, 5)), draw(st.integers(2, 50))
    # From too few pages for one long sequence to enough for two.
    num_pages = max(1, draw(st.integers(7, 20)) * max_model_len // (10 * page_size))
    config = SchedulerConfig(
        max_queue=draw(st.integers(1, 8)),
        step_tokens=draw(st.none() | st.integers(slots, slots + 24)),
        decode_steps=draw(st.none() | st.integers(1, 8)),
        max_partial_prefills=draw(st.integers(1, 3)),
        headroom_pages=draw(st.integers(0, 2)),
    )
    return Engine(
        num_slots=slots,
        num_pages=num_pages,
        page_size=page_size,
        max_model_len=max_model_len,
        programs=(
            Program(ProgramKind.MIXED, small, draw(st.integers(1, min(small, slots)))),
            Program(ProgramKind.MIXED, max(small, slots) + more, slots),
            *(Program(ProgramKind.DECODE, rows, rows, steps) for rows, steps in decodes),
        ),
        max_processor_rows=draw(st.integers(1, 2)),
        config=config,
    )


class Drill:
    """A scheduler and a device under random orders; checks everything after each."""

    def __init__(
        self, engine: Engine, seed: int, depth: int = 2, cache: KVCache | None = None
    ) -> None:
        """`depth` is the most steps in flight; in `cache`, sequences find computed pages."""
        self.random = random.Random(seed)
        self.engine = engine
        self.keeps = cache is not None
        self.cache = cache or KVCache(single_group(engine.page_size), engine.num_pages)
        self.scheduler = Scheduler(
            engine.config,
            cache=self.cache,
            num_slots=engine.num_slots,
            max_model_len=engine.max_model_len,
            programs=engine.programs,
            max_processor_rows=engine.max_processor_rows,
        )
        self.executor = SimulatedExecutor(
            engine.programs,
            num_slots=engine.num_slots,
            num_pages=engine.num_pages,
            page_size=engine.page_size,
            model=MODEL,
            max_processor_rows=engine.max_processor_rows,
            pages_per_slot=-(-engine.max_model_len // engine.page_size),
            num_host_pages=(
                self.cache.num_host_pages if isinstance(self.cache, SwappingCache) else 0
            ),
        )
        # Each run leans its own way: crowded, idle, impatient, one or two steps ahead.
        self.weights = [self.random.choice((1, 3, 5)), self.random.choice((0, 0, 0.2, 1)), 3, 3]
        self.now_s = 0.0
        self.pipeline = Pipeline(self.scheduler, self.executor, depth)
        self.num_requests = 0
        self.plans: list[StepPlan] = []
        self.requests: dict[str, Request] = {}  # live ones
        self.arrivals: dict[str, float] = {}
        self.queue_s: dict[str, float] = {}  # queue times of live sequences that were admitted
        self.updates: dict[str, list[SequenceUpdate]] = {}
        self.turns: list[tuple[int, ...]] = []  # prompts with their whole answers, the latest
        self.salted: dict[str, list[tuple[int, ...]]] = {}  # all that was computed, by salt
        self.overtaken = Counter[str]()  # newcomers before a live sequence that waited
        self.num_overtaken = 0
        self.cached_tokens: dict[str, int] = {}  # of live sequences that were admitted
        self.num_done = 0
        self.num_in_flight_preemptions = 0
        self.num_leaving_aborts = 0  # of sequences with a page on its way to the host

    def run(self, num_ops: int) -> None:
        orders = [self.add, self.abort, self.plan, self.commit]
        for _ in range(num_ops):
            self.now_s += self.random.random()
            self.random.choices(orders, self.weights)[0]()
            self.check_memory()
        self.finish()

    def finish(self) -> None:
        """Everything ends within the steps that one token a step for one sequence would take."""
        most = sum(len(r.prompt) + r.sampling.max_tokens for r in self.requests.values())
        most = 4 * most + 4
        while self.scheduler.has_work:
            self.plan()
            self.commit()
            most -= 1
            assert most > 0, "no progress"
        while self.pipeline.num_in_flight:
            self.commit()
        assert not self.requests
        stats = self.scheduler.stats()
        assert (stats.num_waiting, stats.num_running) == (0, 0)
        assert (stats.free_slots, stats.free_pages) == (
            self.engine.num_slots,
            self.engine.num_pages,
        )

    # Orders.

    def add(self) -> None:
        request = self.new_request()
        total = min(len(request.prompt) + request.sampling.max_tokens, self.engine.max_model_len)
        fits = (
            len(request.prompt) < self.engine.max_model_len
            and total - 1 <= self.engine.num_pages * self.engine.page_size
        )
        queued = self.scheduler.stats().num_waiting
        try:
            self.scheduler.add(request, self.now_s)
        except PromptTooLong:
            assert not fits
        except Overloaded:
            assert queued >= self.engine.config.max_queue
        else:
            assert fits
            assert queued < self.engine.config.max_queue
            self.requests[request.id] = request
            self.arrivals[request.id] = self.now_s
            self.updates[request.id] = []

    def new_request(self) -> Request:
        pick = self.random
        # Ids come again once their request has ended, even while its steps are in flight.
        names = [name for name in map(str, range(12)) if name not in self.requests]
        self.num_requests += 1
        rules = pick.random() < 0.2
        name = pick.choice(names) if names else f"n{self.num_requests}"
        # Where pages are kept, a few prompts begin alike.
        tokens = random.Random(pick.randrange(3)) if self.keeps else pick
        prompt = tuple(
            tokens.randrange(MODEL.vocab)
            for _ in range(pick.choice((1, 2, 3, 4, 5, 6, 7, 15, self.engine.max_model_len - 1)))
        )
        if self.keeps and self.turns and pick.random() < 0.3:
            # The next turn of a chat: the stop token of the last one is part of it.
            more = [pick.randrange(MODEL.vocab) for _ in range(pick.choice((1, 1, 2, 4)))]
            turn = (*pick.choice(self.turns), *more)
            prompt = turn if len(turn) < self.engine.max_model_len else prompt
        return Request(
            id=name,
            prompt=prompt,
            sampling=SamplingParams(
                seed=pick.randrange(1 << 40),
                max_tokens=pick.choice((1, 2, 6, 20, 25, 30, 60)),
                min_tokens=pick.choice((0, 0, 3)),
                ignore_eos=pick.random() < 0.3,
                stop_token_ids=(9,) if pick.random() < 0.3 else (),
                # Rules and penalties are not honoured by the model, but counted.
                bad_token_ids=(60,) if rules else (),
                presence_penalty=pick.choice((0.0, 0.0, 0.5)),
                logprobs=pick.choice((None, None, None, 0, 3)),
                prompt_logprobs=pick.choice((None, None, None, 0, 2)),
            ),
            priority=pick.choice((0, 0, 0, 1, -1)),
            cache_salt=pick.choice(("", "", "other")) if self.shares else "",
        )

    def abort(self) -> None:
        if self.random.random() < 0.1 or not self.requests:
            assert not self.scheduler.abort("unknown")
            return
        name = self.random.choice(sorted(self.requests))
        if isinstance(self.cache, SwappingCache):
            self.num_leaving_aborts += self.cache.leaves(self.known_tokens(name))
        assert self.scheduler.abort(name)
        assert not self.scheduler.abort(name)
        self.remember(self.requests.pop(name))
        for known in (self.queue_s, self.cached_tokens, self.overtaken):
            known.pop(name, None)

    def remember(self, request: Request) -> None:
        """Keeps all tokens that were, or may have been, computed for a sequence that ends."""
        if self.shares:
            whole = request.prompt + tuple(MODEL.generate(request, self.engine.max_model_len)[0])
            self.salted.setdefault(request.cache_salt, []).append(whole)

    @property
    def shares(self) -> bool:
        """Whether pages are kept by the cache itself, not by one made for tests."""
        return self.cache.shares_prefixes

    def known_tokens(self, name: str) -> tuple[int, ...]:
        updates = self.updates[name]
        return self.requests[name].prompt + tuple(t for update in updates for t in update.tokens)

    def plan(self) -> None:
        if self.pipeline.num_in_flight == self.pipeline.depth:
            self.commit()
            return
        running = self.scheduler.audit().running
        plan = self.pipeline.start(self.now)
        after = self.scheduler.audit()
        if plan is None:
            # Nothing can run only because it waits for steps in flight.
            assert not after.running
            assert not after.waiting or after.waiting[0].num_in_flight
            return
        self.plans.append(plan)
        rows = {chunk.slot for chunk in plan.chunks}
        states = {seq.id: after.find(seq.id).state for seq in running}
        preempted = [seq for seq in running if states[seq.id] is SequenceState.WAITING]
        kept = [seq for seq in running if states[seq.id] is not SequenceState.WAITING]
        self.num_in_flight_preemptions += sum(seq.num_in_flight > 0 for seq in preempted)
        for seq in running:
            if seq.decodes:
                assert seq in preempted or seq.slot in rows, "a decode was skipped"
        if kept:
            assert kept[0].slot in rows, "the first in rank did not get on"
        if preempted and kept:
            assert min(seq.rank for seq in preempted) > max(seq.rank for seq in kept)
        if preempted and all(states[seq.id] is SequenceState.RUNNING for seq in kept):
            last_victim = min(preempted, key=lambda seq: seq.rank)
            free = self.scheduler.stats().free_pages
            assert free <= last_victim.num_pages, "a needless preemption"
        self.check_admissions(plan, after)

    def now(self) -> float:
        return self.now_s

    def check_admissions(self, plan: StepPlan, after: Audit) -> None:
        """Nobody who waits, and could run, was overtaken."""
        for admission in plan.admissions:
            name = admission.request.id
            self.queue_s.setdefault(name, self.now_s - self.arrivals[name])
            if admission.output:  # the prompt was reported with the first token
                [chunk] = [chunk for chunk in plan.chunks if chunk.slot == admission.slot]
                assert chunk.prompt_targets == ()
            if self.shares:
                self.check_salt(admission)
            first = min(admission.num_computed, len(admission.request.prompt))
            self.cached_tokens.setdefault(name, first)
            self.overtaken.pop(name, None)
        if plan.admissions and after.waiting:
            admitted = {a.slot for a in plan.admissions}
            newcomers = [seq.rank for seq in after.running if seq.slot in admitted]
            latest = max(newcomers, default=(-9,))
            for seq in after.waiting:
                if seq.rank < latest:
                    self.check_overtaken(seq, sum(seq.rank < rank for rank in newcomers), after)

    def check_salt(self, admission: Admission) -> None:
        """The tokens that the sequence found had been computed under its own salt."""
        request, num_computed = admission.request, admission.num_computed
        found = (request.prompt + admission.output)[:num_computed]
        alive = [
            (*other.prompt, *MODEL.generate(other, self.engine.max_model_len)[0])
            for other in self.requests.values()
            if other.cache_salt == request.cache_salt
        ]
        known = [*self.salted.get(request.cache_salt, ()), *alive]
        assert any(tokens[:num_computed] == found for tokens in known)

    def check_overtaken(self, seq: SequenceRecord, times: int, after: Audit) -> None:
        """A page that `seq` needs was being computed, and it does not happen to it for ever."""
        assert self.shares
        request, size = self.requests[seq.id], self.engine.page_size
        others = [self.requests[other.id] for other in (*after.running, *after.retired)]
        assert any(
            other.cache_salt == request.cache_salt and other.prompt[:size] == request.prompt[:size]
            for other in others
        )
        self.overtaken[seq.id] += times
        self.num_overtaken += times
        # Those passed over are fewer than the slots that one step fills at a time.
        assert self.overtaken[seq.id] < self.engine.config.max_overtakes + self.engine.num_slots

    def commit(self) -> None:
        if not self.pipeline.num_in_flight:
            self.plan()
            return
        for update in self.pipeline.finish(self.now):
            assert update.request_id in self.requests, "an update of a dead sequence"
            updates = self.updates[update.request_id]
            updates.append(update)
            first = len(updates) == 1
            assert update.queue_s == (self.queue_s[update.request_id] if first else None)
            cached_tokens = self.cached_tokens[update.request_id] if first else 0
            assert not self.shares or update.cached_tokens == cached_tokens
            if update.finish is not None:
                request = self.requests.pop(update.request_id)
                self.remember(request)
                self.check_answer(request, updates)
                del self.queue_s[update.request_id], self.cached_tokens[update.request_id]
                self.overtaken.pop(update.request_id, None)
                self.num_done += 1

    # Invariants.

    def check_memory(self) -> None:
        """Every slot and page is free or has one owner."""
        found = self.scheduler.audit()
        assert not found.problems
        stats = self.scheduler.stats()
        held = sum(seq.num_pages for seq in found.running)
        if self.shares or isinstance(self.cache, SharingCache):
            assert stats.free_pages >= self.engine.num_pages - held
        else:
            assert stats.free_pages == self.engine.num_pages - held
        assert stats.free_slots == self.engine.num_slots - len(found.running)
        assert stats.num_waiting + stats.num_running == len(self.requests)
        assert stats.num_waiting <= self.engine.config.max_queue + self.engine.num_slots

    def check_answer(self, request: Request, updates: list[SequenceUpdate]) -> None:
        """The answer is what the model gives alone, log-probabilities included."""
        output, finish = MODEL.generate(request, self.engine.max_model_len)
        assert [token for update in updates for token in update.tokens] == output
        assert updates[-1].finish is finish
        self.turns = [*self.turns[-6:], (*request.prompt, *output)]
        digest, of_prompt = EMPTY_DIGEST, [None]
        for token, following in zip(request.prompt, request.prompt[1:], strict=False):
            digest = extend(digest, token)
            of_prompt.append(MODEL.logprobs(digest, following))
        digest, of_output = extend(digest, request.prompt[-1]), []
        for token in output:
            of_output.append(MODEL.logprobs(digest, token))
            digest = extend(digest, token)
        num_top = request.sampling.prompt_logprobs
        assert updates[0].prompt_logprobs == cut(of_prompt, num_top)
        assert all(update.prompt_logprobs is None for update in updates[1:])
        num_top = request.sampling.logprobs
        if num_top is None:
            assert all(update.logprobs is None for update in updates)
        else:
            got = tuple(entry for update in updates for entry in update.logprobs or ())
            assert got == cut(of_output, num_top)


def cut(
    entries: list[TokenLogprobs | None], num_top: int | None
) -> tuple[TokenLogprobs | None, ...] | None:
    if num_top is None:
        return None
    return tuple(
        entry and TokenLogprobs(entry.token_id, entry.logprob, entry.rank, entry.top[:num_top])
        for entry in entries
    )
