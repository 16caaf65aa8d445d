"""An engine without a model, for tests and for trying the gateway: deterministic, in process."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from jserve.core.errors import EngineError, Overloaded, Unavailable
from jserve.core.request import (
    EngineInfo,
    FinishReason,
    Request,
    SequenceUpdate,
    TokenLogprobs,
)
from jserve.core.stats import EngineStats
from jserve.gateway.engine_client import LiveStreams, UpdateStream

Reply = Callable[[Request], Sequence[int]]
Cached = Callable[[Request], int]  # prompt tokens that need not be computed


def echo(request: Request) -> Sequence[int]:
    """Answers with the prompt again and again."""
    repeats = request.sampling.max_tokens // len(request.prompt) + 1
    return request.prompt * repeats


def nothing_cached(request: Request) -> int:
    return 0


@dataclass(slots=True)
class _Sequence:
    request: Request
    script: Sequence[int]
    done: int = 0
    begun: bool = False


@dataclass(slots=True)
class ScriptedSequences:
    """Slots and a queue whose sequences follow a script. Synchronous; not thread-safe.

    A sequence ends with STOP on an id of `eos_token_ids` (unless ignore_eos) or of
    `stop_token_ids`, or when its script does; with LENGTH at max_tokens.
    """

    info: EngineInfo
    reply: Reply = echo
    cached: Cached = nothing_cached
    waiting: list[_Sequence] = field(default_factory=list[_Sequence])
    running: list[_Sequence] = field(default_factory=list[_Sequence])
    _steps: int = 0
    _output: int = 0
    _queried: int = 0  # prompt tokens, of which
    _found: int = 0  # were cached

    def add(self, request: Request) -> None:
        """Queues a request; raises Overloaded when the queue is full."""
        room = self.info.max_queue + self.info.num_slots - len(self.running)
        if len(self.waiting) >= room and not request.resumed:
            raise Overloaded(f"the queue of {self.info.max_queue} is full", retry_after_s=1.0)
        self.waiting.append(_Sequence(request, self.reply(request), len(request.output)))

    def abort(self, request_id: str) -> None:
        """Forgets a sequence, known or not."""
        self.waiting = [s for s in self.waiting if s.request.id != request_id]
        self.running = [s for s in self.running if s.request.id != request_id]

    def step(self, num_tokens: int = 1) -> list[SequenceUpdate]:
        """Up to `num_tokens` tokens for every running sequence."""
        room = self.info.num_slots - len(self.running)
        self.running += self.waiting[:room]
        self.waiting = self.waiting[room:]
        updates = [self._advance(sequence, num_tokens) for sequence in self.running]
        finished = {u.request_id for u in updates if u.finish is not None}
        self.running = [s for s in self.running if s.request.id not in finished]
        self._steps += 1
        self._output += sum(len(u.tokens) for u in updates)
        return updates

    def stats(self) -> EngineStats:
        return EngineStats(
            num_waiting=len(self.waiting),
            num_running=len(self.running),
            free_slots=self.info.num_slots - len(self.running),
            free_pages=self.info.num_pages,
            num_steps=self._steps,
            output_tokens=self._output,
            prefix_query_tokens=self._queried,
            prefix_hit_tokens=self._found,
        )

    def _advance(self, sequence: _Sequence, num_tokens: int) -> SequenceUpdate:
        sampling = sequence.request.sampling
        stops = set(sampling.stop_token_ids)
        if not sampling.ignore_eos:
            stops.update(self.info.eos_token_ids)
        first = sequence.done == 0
        cached_tokens = 0 if sequence.begun else self._begin(sequence)
        tokens: list[int] = []
        finish = None
        while finish is None and len(tokens) < num_tokens:
            if sequence.done >= len(sequence.script):
                finish = FinishReason.STOP
                break
            token = sequence.script[sequence.done]
            sequence.done += 1
            tokens.append(token)
            if token in stops and sequence.done >= sampling.min_tokens:
                finish = FinishReason.STOP
            elif sequence.done >= sampling.max_tokens:
                finish = FinishReason.LENGTH
        prompt = sequence.request.prompt
        return SequenceUpdate(
            sequence.request.id,
            tuple(tokens),
            finish,
            None
            if sampling.logprobs is None
            else tuple(self._logprobs(t, sampling.logprobs) for t in tokens),
            None
            if sampling.prompt_logprobs is None or not first
            else (None, *(self._logprobs(t, sampling.prompt_logprobs) for t in prompt[1:])),
            0.0 if first else None,
            cached_tokens=cached_tokens,
        )

    def _begin(self, sequence: _Sequence) -> int:
        """Returns the prompt tokens that are cached."""
        sequence.begun = True
        found = self.cached(sequence.request)
        self._queried += len(sequence.request.prompt)
        self._found += found
        return found

    def _logprobs(self, token: int, num_top: int) -> TokenLogprobs:
        top = ((token + i, -0.5 * (i + 1)) for i in range(num_top) if token + i < self.info.vocab)
        return TokenLogprobs(token, -0.5, 1, tuple(top))


class FakeEngine:
    """An `EngineClient` over `ScriptedSequences`; steps while there is work.

    `aborted` records the aborts, in order. Owned by one event loop.
    """

    def __init__(
        self,
        info: EngineInfo,
        *,
        reply: Reply = echo,
        cached: Cached = nothing_cached,
        step_s: float = 0.0,
        tokens_per_step: int = 1,
    ) -> None:
        self.info: EngineInfo | None = info
        self.ready = True
        self.aborted: list[str] = []
        self.submitted: list[Request] = []
        self._sequences = ScriptedSequences(info, reply, cached)
        self._step_s = step_s
        self._tokens_per_step = tokens_per_step
        self._streams = LiveStreams()
        self._stepping: asyncio.Task[None] | None = None

    @property
    def stats(self) -> EngineStats:
        return self._sequences.stats()

    def submit(self, requests: Sequence[Request]) -> UpdateStream:
        if not self.ready:
            raise Unavailable("the engine is not running; try again", retry_after_s=1.0)
        stream, named = self._streams.open(self, requests)
        try:
            for request, sent in zip(requests, named, strict=True):
                self._sequences.add(sent)
                self.submitted.append(request)
        except Overloaded as error:
            stream.fail(error)
        if self._stepping is None or self._stepping.done():
            self._stepping = asyncio.get_running_loop().create_task(self._run())
        return stream

    def abort(self, request_id: str) -> None:
        name = self._streams.close(request_id)
        if name is not None:
            self.aborted.append(request_id)
            self._sequences.abort(name)

    def crash(self) -> None:
        """Loses everything in flight, as a killed engine process does."""
        self.ready = False
        self._sequences.running.clear()
        self._sequences.waiting.clear()
        self._streams.fail_all(EngineError("the engine stopped while it worked on the request"))

    def restart(self) -> None:
        self.ready = True

    async def close(self) -> None:
        """Stops stepping; nothing is posted any more."""
        self.crash()
        if self._stepping is not None:
            self._stepping.cancel()
            await asyncio.wait([self._stepping])

    async def _run(self) -> None:
        while self._sequences.running or self._sequences.waiting:
            await asyncio.sleep(self._step_s)
            for update in self._sequences.step(self._tokens_per_step):
                self._streams.post(update)
