"""Drives an engine by the pipeline that serves, and times each part of its turns."""

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from jserve.core.errors import ConfigError
from jserve.core.request import Request, SamplingParams
from jserve.core.step import Executor, ProgramKind, StepPlan, StepResult
from jserve.engine.build.assembly import Engine
from jserve.engine.pipeline import Pipeline

_R = TypeVar("_R")


class HostTimes(NamedTuple):
    """CPU seconds of the loop's thread for one plan; waiting for the device is not in them."""

    plan: float
    submit: float  # pack, and start the program
    collect: float  # take the result apart, once it is there
    commit: float


@dataclass(frozen=True, slots=True)
class Turn:
    """One plan from its start on the device to its commit."""

    plan: StepPlan
    num_tokens: int  # sampled
    started_s: float  # when it was submitted or, if that is later, the step before it ended
    ended_s: float
    host: HostTimes

    @property
    def device_s(self) -> float:
        """Seconds of the device for this plan, its waits for the host included."""
        return self.ended_s - self.started_s


class _Submitted(NamedTuple):
    plan: StepPlan
    handle: Any
    at_s: float
    plan_s: float
    submit_s: float


class _TimedExecutor:
    """An executor that measures itself and, by what lies between its calls, the scheduler."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._ended_s = 0.0  # when the device finished its latest step
        self.turn_began_s = 0.0  # CPU seconds of the thread, as all that follow
        self.collected_s = 0.0
        self.finished: Turn | None = None  # the step that was collected last, its commit to come

    def submit(self, plan: StepPlan) -> _Submitted:
        plan_s = time.thread_time() - self.turn_began_s
        at_s = time.perf_counter()
        handle, submit_s = _timed(lambda: self._executor.submit(plan))
        return _Submitted(plan, handle, at_s, plan_s, submit_s)

    def collect(self, handle: _Submitted) -> StepResult:
        jax.block_until_ready(handle.handle.step.result.packed)
        started_s = max(self._ended_s, handle.at_s)
        self._ended_s = time.perf_counter()
        result, collect_s = _timed(lambda: self._executor.collect(handle.handle))
        host = HostTimes(handle.plan_s, handle.submit_s, collect_s, commit=0.0)
        num_tokens = int(result.num_new.sum())
        self.finished = Turn(handle.plan, num_tokens, started_s, self._ended_s, host)
        self.collected_s = time.thread_time()
        return result


class Driver:
    """Owns the scheduler and executor of an engine while it is measured."""

    def __init__(self, engine: Engine, seed: int = 0) -> None:
        self.engine = engine
        self._scheduler = engine.scheduler
        self._executor = _TimedExecutor(engine.executor)
        self._pipeline = Pipeline(engine.scheduler, self._executor)
        self._rng = np.random.default_rng(seed)
        self._live: list[str] = []
        self._num_added = 0

    def add(self, count: int, prompt_tokens: int, max_tokens: int, shared_tokens: int = 0) -> None:
        """Queues greedy requests of random prompts that nothing but their limit ends.

        All of them begin with the same `shared_tokens` tokens, which no earlier prompt has.
        """
        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, seed=0)
        vocab = self.engine.info.vocab
        shared = self._rng.integers(0, vocab, shared_tokens).tolist()
        for _ in range(count):
            prompt = shared + self._rng.integers(0, vocab, prompt_tokens - shared_tokens).tolist()
            request = Request(id=f"r{self._num_added}", prompt=tuple(prompt), sampling=sampling)
            self._scheduler.add(request, time.monotonic())
            self._live.append(request.id)
            self._num_added += 1

    def turns(self) -> Iterator[Turn]:
        """Yields turns as they end, until there is no work; may be left at any time."""
        while self._pipeline.has_work:
            self._executor.turn_began_s = time.thread_time()
            updates = self._pipeline.turn(time.monotonic)
            commit_s = time.thread_time() - self._executor.collected_s
            turn = self._executor.finished
            if updates is not None and turn is not None:
                yield replace(turn, host=turn.host._replace(commit=commit_s))
            elif not self._pipeline.num_in_flight:
                raise RuntimeError("nothing runs, though there is work")

    def clear(self) -> None:
        """Ends everything that runs or waits."""
        for request_id in self._live:
            self._scheduler.abort(request_id)
        self._live.clear()
        for _ in self.turns():
            pass

    def warm_up(self) -> None:
        """Runs every program once: the first call of each costs more."""
        most = self.engine.info.max_model_len - 64
        for made in self.engine.programs:
            if made.program.kind is ProgramKind.MIXED:
                self.add(1, min(made.program.tokens, most), 1)
            else:
                self.add(made.program.rows, 8, 2 * made.program.steps + 1)
            for _ in self.turns():
                pass
        self._live.clear()


def decode(
    driver: Driver, levels: list[int], prompt_tokens: int, num_turns: int
) -> Iterator[list[Turn]]:
    """Turns in which nothing but decoding happens, for each number of live rows, ascending.

    Rows are added to those that run, so that each prompt is computed once. By then the older rows
    are longer than their prompt: a plan's chunks tell where each row stands.
    """
    limit = decode_tokens(driver.engine, levels, prompt_tokens, num_turns)
    live = 0
    for rows in levels:
        driver.add(rows - live, prompt_tokens, limit)
        live = rows
        turns = (turn for turn in driver.turns() if _only_decodes(turn, rows))
        timed = list(itertools.islice(turns, num_turns + 1))[1:]  # the first may be slow
        if len(timed) < num_turns:
            raise ConfigError(f"{rows} rows ended before {num_turns} turns; lower --turns")
        yield timed
    driver.clear()


def decode_tokens(engine: Engine, levels: list[int], prompt_tokens: int, num_turns: int) -> int:
    """Tokens that the oldest row of `decode` gets at most: alone, and beside prompts."""
    mixed = max(p.program.tokens for p in engine.programs if p.program.kind is ProgramKind.MIXED)
    steps = max(p.program.steps for p in engine.programs)
    beside = levels[-1] * prompt_tokens // (mixed - levels[-1]) + 2 * len(levels)
    return beside + len(levels) * (num_turns + 4) * steps


def fitting(engine: Engine, levels: list[int], prompt_tokens: int, num_turns: int) -> list[int]:
    """The first of `levels` that the pages and the context suffice for."""
    for count in range(len(levels), 0, -1):
        oldest = prompt_tokens + decode_tokens(engine, levels[:count], prompt_tokens, num_turns)
        # Rows that come at a later level have missed the steps of those before.
        missed = (oldest - prompt_tokens) // count
        pages, rows_before = 0, 0
        for level, rows in enumerate(levels[:count]):
            tokens = oldest - level * missed
            pages += (rows - rows_before) * (-(-tokens // engine.info.page_size) + 1)
            rows_before = rows
        if pages <= engine.info.num_pages and oldest <= engine.info.max_model_len:
            return levels[:count]
    return []


def prefill(driver: Driver, count: int, prompt_tokens: int) -> list[Turn]:
    """The turns that `count` prompts take which come at once to an idle engine."""
    driver.add(count, prompt_tokens, 1)
    turns = list(driver.turns())
    driver.clear()
    return turns


def _only_decodes(turn: Turn, rows: int) -> bool:
    prompts = any(chunk.tokens for chunk in turn.plan.chunks)
    return not prompts and len(turn.plan.chunks) == rows


def _timed(call: Callable[[], _R]) -> tuple[_R, float]:
    started = time.thread_time()
    done = call()
    return done, time.thread_time() - started
