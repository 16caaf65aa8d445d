"""One answer of the OpenAI API: runs its generations and writes their deltas, whole or as events.

Choice `i` of prompt `p` has the index `p × n + i`.
"""

import asyncio
import math
from collections import Counter
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import orjson

from jserve.gateway.buffers import BufferAccount
from jserve.gateway.http.event_stream import event
from jserve.gateway.http.interleave import interleaved
from jserve.gateway.http.openai_response import Head, Json, usage_json
from jserve.gateway.http.openai_shape import Shape
from jserve.gateway.metrics import GatewayMetrics
from jserve.gateway.output import delta_bytes, join, num_logprobs
from jserve.gateway.pauses import LARGE, Pauses
from jserve.gateway.request_plane import GenerationRequest, OutputDelta, OutputStream, RequestPlane


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One answer in the making; `whole` or `events` is called once."""

    head: Head
    generations: tuple[GenerationRequest, ...]  # one per prompt
    shape: Shape
    plane: RequestPlane
    metrics: GatewayMetrics
    include_usage: bool
    continuous_usage: bool
    num_best: int | None = None  # the choices of a prompt that are answered; None: all

    async def whole(self) -> bytes:
        """Returns the complete JSON object.

        Raises:
            JserveError: the engine refused a generation, or failed.
        """
        choices: dict[tuple[int, int], list[OutputDelta]] = {}
        account = self._open_account()
        try:
            async with aclosing(interleaved(await self._start(account))) as deltas:
                async for prompt, delta in deltas:
                    choices.setdefault((prompt, delta.index), []).append(delta)
                    account.add(delta_bytes(delta))
            done = [
                (prompt, join(choices.pop((prompt, index)))) for prompt, index in sorted(choices)
            ]
            # 20 for each of 4,000 tokens take 140 ms, in which the event loop would serve nobody.
            if sum(map(num_logprobs, (delta for _, delta in done))) > LARGE:
                async with self.plane.large_answers:
                    return await asyncio.to_thread(self._whole, done)
            return self._whole(done)
        finally:
            account.close()

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Yields the answer as server-sent events, without the closing one."""
        tokens: Counter[int] = Counter()  # by choice
        cached: Counter[int] = Counter()  # by prompt
        pauses = Pauses()  # a reader that was slow gets many large deltas at once
        account = self._open_account()
        try:
            async with aclosing(interleaved(await self._start(account))) as deltas:
                async for prompt, delta in deltas:
                    index = self._index(prompt, delta.index)
                    tokens[index] += len(delta.token_ids)
                    if delta.index == 0:
                        cached[prompt] += delta.cached_tokens
                    usage = self._usage_so_far(prompt, tokens[index], cached[prompt])
                    if delta.logprobs is None and delta.prompt_logprobs is None:
                        data = self._event(prompt, delta, usage)
                    else:
                        data = await self._large_event(prompt, delta, usage, pauses)
                    if data:
                        yield data
        finally:
            account.close()
        if self.include_usage:
            yield event(self._chunk([]) | {"usage": self._usage(tokens.total(), cached.total())})

    def _open_account(self) -> BufferAccount:
        return self.plane.buffers.open(self.generations[0].caller.name)

    async def _large_event(
        self, prompt: int, delta: OutputDelta, usage: Json, pauses: Pauses
    ) -> bytes:
        pauses.start()
        if num_logprobs(delta) > LARGE:
            async with self.plane.large_answers:
                data = await asyncio.to_thread(self._event, prompt, delta, usage)
        else:
            data = self._event(prompt, delta, usage)
        await pauses.end()
        return data

    def _whole(self, done: Sequence[tuple[int, OutputDelta]]) -> bytes:
        # Each is written before the next one is made: as objects they take ten times the memory.
        choices = [
            orjson.Fragment(orjson.dumps(self.shape.choice(index, prompt, delta)))
            for index, prompt, delta in self._answered(done)
        ]
        json = self.head.json(self.shape.kind, choices)
        json["usage"] = self._usage(
            sum(len(delta.token_ids) for _, delta in done),
            sum(delta.cached_tokens for _, delta in done if delta.index == 0),
        )
        return orjson.dumps(json | self.shape.beside(done[0][1].prompt_logprobs, whole=True))

    def _answered(
        self, done: Sequence[tuple[int, OutputDelta]]
    ) -> Iterator[tuple[int, int, OutputDelta]]:
        """Yields the index, the prompt and the delta of every choice that is answered."""
        if self.num_best is None:
            yield from ((self._index(prompt, it.index), prompt, it) for prompt, it in done)
            return
        for prompt in range(len(self.generations)):
            best = sorted((it for p, it in done if p == prompt), key=_mean_logprob, reverse=True)
            for rank, delta in enumerate(best[: self.num_best]):
                yield prompt * self.num_best + rank, prompt, delta

    def _event(self, prompt: int, delta: OutputDelta, usage: Json) -> bytes:
        """Writes one chunk, with fields of `usage` if there are any; empty if it shows nothing."""
        choice = self.shape.chunk(self._index(prompt, delta.index), prompt, delta)
        if choice is None:
            return b""
        chunk = self._chunk([choice]) | self.shape.beside(delta.prompt_logprobs, whole=False)
        return event(chunk | usage)

    def _chunk(self, choices: list[Json]) -> Json:
        json = self.head.json(self.shape.chunk_kind, choices)
        if self.include_usage:
            json["usage"] = None
        return json

    async def _start(self, account: BufferAccount | None) -> list[OutputStream]:
        started: list[OutputStream] = []
        pauses = Pauses()
        try:
            for generation in self.generations:
                if started:
                    await pauses.end()
                started.append(self.plane.run(generation, self.metrics, account))
        except BaseException:
            for deltas in started:
                deltas.close()
            raise
        return started

    def _index(self, prompt: int, choice: int) -> int:
        return prompt * self.generations[prompt].n + choice

    def _usage_so_far(self, prompt: int, num_tokens: int, cached_tokens: int) -> Json:
        """The field of a chunk with what one choice has used so far, as in vLLM and SGLang."""
        if not self.continuous_usage:
            return {}
        prompt_tokens = len(self.generations[prompt].prompt.ids)
        return {"usage": usage_json(prompt_tokens, num_tokens, cached_tokens)}

    def _usage(self, completion_tokens: int, cached_tokens: int) -> Json:
        """The usage of the whole answer. Of each prompt the first choice says what was cached."""
        prompt_tokens = sum(len(it.prompt.ids) for it in self.generations)
        return usage_json(
            prompt_tokens, completion_tokens, cached_tokens, self.shape.reasoning_tokens
        )


def _mean_logprob(delta: OutputDelta) -> float:
    logprobs = [entry.logprob for entry in delta.logprobs or ()]
    return sum(logprobs) / len(logprobs) if logprobs else -math.inf
