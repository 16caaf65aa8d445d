"""One answer of the OpenAI API: runs its generations and writes their pieces, whole or as events.

Choice `i` of prompt `p` has the index `p × n + i`.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import orjson

from jserve.gateway.generation import Generation, Generator, Piece, Pieces
from jserve.gateway.http.event_stream import event
from jserve.gateway.http.interleave import interleaved
from jserve.gateway.http.openai_response import Head, Json, usage_json
from jserve.gateway.http.openai_shape import Shape
from jserve.gateway.metrics import GatewayMetrics
from jserve.gateway.pieces import join

# Log-probabilities of a piece beyond which it is written in a thread: 20 for each of 4,000 tokens
# take 140 ms, and the event loop belongs to everybody.
_LARGE = 2000


def _num_logprobs(piece: Piece) -> int:
    entries = (*(piece.logprobs or ()), *(piece.prompt_logprobs or ()))
    return sum(1 + len(entry.top) for entry in entries if entry is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Everything that one answer needs; `whole` or `events` is called once."""

    head: Head
    generations: tuple[Generation, ...]  # one per prompt
    shape: Shape
    generator: Generator
    metrics: GatewayMetrics
    include_usage: bool

    async def whole(self) -> bytes:
        """The complete object.

        Raises:
            JserveError: the engine refused a generation, or failed.
        """
        choices: dict[tuple[int, int], list[Piece]] = {}
        async with aclosing(interleaved(self._start())) as pieces:
            async for prompt, piece in pieces:
                choices.setdefault((prompt, piece.index), []).append(piece)
        done = [(prompt, join(choices[prompt, index])) for prompt, index in sorted(choices)]
        if sum(map(_num_logprobs, (piece for _, piece in done))) > _LARGE:
            return await asyncio.to_thread(self._whole, done)
        return self._whole(done)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The same as server-sent events, without the closing one."""
        completion_tokens = 0
        async with aclosing(interleaved(self._start())) as pieces:
            async for prompt, piece in pieces:
                completion_tokens += len(piece.token_ids)
                if _num_logprobs(piece) > _LARGE:
                    data = await asyncio.to_thread(self._event, prompt, piece)
                else:
                    data = self._event(prompt, piece)
                if data:
                    yield data
        if self.include_usage:
            yield event(self._chunk([]) | {"usage": self._usage(completion_tokens)})

    def _whole(self, done: Sequence[tuple[int, Piece]]) -> bytes:
        choices = [
            self.shape.choice(self._index(prompt, piece.index), prompt, piece)
            for prompt, piece in done
        ]
        json = self.head.json(self.shape.kind, choices)
        json["usage"] = self._usage(sum(len(piece.token_ids) for _, piece in done))
        return orjson.dumps(json | self.shape.beside(done[0][1].prompt_logprobs))

    def _event(self, prompt: int, piece: Piece) -> bytes:
        choice = self.shape.chunk(self._index(prompt, piece.index), prompt, piece)
        if choice is None:
            return b""
        return event(self._chunk([choice]) | self.shape.beside(piece.prompt_logprobs))

    def _chunk(self, choices: list[Json]) -> Json:
        json = self.head.json(self.shape.chunk_kind, choices)
        if self.include_usage:
            json["usage"] = None
        return json

    def _start(self) -> list[Pieces]:
        started: list[Pieces] = []
        try:
            for generation in self.generations:
                started.append(self.generator.run(generation, self.metrics))
        except BaseException:
            for pieces in started:
                pieces.close()
            raise
        return started

    def _index(self, prompt: int, choice: int) -> int:
        return prompt * self.generations[prompt].n + choice

    def _usage(self, completion_tokens: int) -> Json:
        return usage_json(sum(len(it.prompt.ids) for it in self.generations), completion_tokens)
