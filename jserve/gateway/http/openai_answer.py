"""One answer of the OpenAI API: runs its generations and writes their pieces, whole or as events.

Choice `i` of prompt `p` has the index `p × n + i`.
"""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Protocol

from jserve.core.errors import EngineError, Unavailable
from jserve.core.request import FinishReason, TokenLogprobs
from jserve.gateway.generation import Generation, Generator, Piece
from jserve.gateway.http.event_stream import event
from jserve.gateway.http.interleave import interleaved
from jserve.gateway.http.openai_response import (
    CompletionLogprobs,
    Head,
    Json,
    TokenText,
    chat_logprobs,
    finish_json,
    prompt_logprobs_json,
    usage_json,
)
from jserve.gateway.metrics import GatewayMetrics, TrackedPieces


@dataclass(slots=True)
class ChoiceText:
    """One choice as it grows; for answers that are not streamed. Owned by one answer."""

    texts: list[str] = field(default_factory=list[str])
    token_ids: list[int] = field(default_factory=list[int])
    logprobs: list[TokenLogprobs] | None = None
    first: Piece | None = None
    last: Piece | None = None

    def add(self, piece: Piece) -> None:
        """Appends the news."""
        self.texts.append(piece.text)
        self.token_ids.extend(piece.token_ids)
        if piece.logprobs is not None:
            self.logprobs = [*(self.logprobs or ()), *piece.logprobs]
        self.first = self.first or piece
        self.last = piece

    def whole(self) -> Piece:
        """All of it as one piece."""
        assert self.first is not None
        assert self.last is not None
        return Piece(
            self.last.index,
            "".join(self.texts),
            tuple(self.token_ids),
            None if self.logprobs is None else tuple(self.logprobs),
            self.first.prompt_logprobs,
            self.last.finish,
            self.last.stop_reason,
        )


class Shape(Protocol):
    """How the pieces of one route's answers look in JSON."""

    kind: str
    chunk_kind: str

    def choice(self, index: int, prompt: int, piece: Piece) -> Json:
        """A whole choice, from one piece that has all of it."""
        ...

    def chunk(self, index: int, prompt: int, piece: Piece) -> Json | None:
        """The choice of a chunk; None when the piece has no news for the client."""
        ...

    def beside(self, prompt_logprobs: Sequence[TokenLogprobs | None] | None) -> Json:
        """Fields of the answer beside its choices."""
        ...


class CompletionShape:
    """`text_completion`. Owned by one answer."""

    kind = "text_completion"
    chunk_kind = "text_completion"

    def __init__(
        self, generations: Sequence[Generation], tokens: TokenText, *, prompt_logprobs: bool
    ) -> None:
        self._generations = generations
        self._tokens = tokens
        self._prompt_logprobs = prompt_logprobs  # asked for by name, not only by echo
        self._logprobs: dict[int, CompletionLogprobs] = {}  # by choice

    def choice(self, index: int, prompt: int, piece: Piece) -> Json:
        """See `Shape`."""
        choice = {
            "index": index,
            "text": piece.text,
            "logprobs": self._logprobs_of(index, prompt, piece),
            **finish_json(piece),
        }
        if self._prompt_logprobs and piece.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs_json(piece.prompt_logprobs, self._tokens)
        return choice

    def chunk(self, index: int, prompt: int, piece: Piece) -> Json | None:
        """See `Shape`."""
        return self.choice(index, prompt, piece) if _has_news(piece) else None

    def beside(self, prompt_logprobs: Sequence[TokenLogprobs | None] | None) -> Json:
        """See `Shape`."""
        return {"system_fingerprint": None}

    def _logprobs_of(self, index: int, prompt: int, piece: Piece) -> Json | None:
        generation = self._generations[prompt]
        top = generation.sampling.logprobs
        if top is None:
            return None
        ids = piece.token_ids
        entries: tuple[TokenLogprobs | None, ...] = piece.logprobs or ()
        if generation.echo and piece.prompt_logprobs is not None:
            ids = generation.prompt.ids + ids
            entries = tuple(piece.prompt_logprobs) + entries
        builder = self._logprobs.get(index)
        if builder is None:
            builder = self._logprobs[index] = CompletionLogprobs(self._tokens, top)
        return builder.add(ids, entries)


class ChatShape:
    """`chat.completion`. Owned by one answer."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def __init__(self, tokens: TokenText) -> None:
        self._tokens = tokens
        self._opened: set[int] = set()  # choices whose role was sent

    def choice(self, index: int, prompt: int, piece: Piece) -> Json:
        """See `Shape`."""
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        return self._choice(index, piece, "message", message)

    def chunk(self, index: int, prompt: int, piece: Piece) -> Json | None:
        """See `Shape`."""
        if index not in self._opened:
            self._opened.add(index)
            delta = {"role": "assistant", "content": piece.text}
        elif not _has_news(piece):
            return None
        else:
            delta = {"content": piece.text} if piece.text else {}
        return self._choice(index, piece, "delta", delta)

    def beside(self, prompt_logprobs: Sequence[TokenLogprobs | None] | None) -> Json:
        """See `Shape`."""
        fields: Json = {"system_fingerprint": None}
        if prompt_logprobs is not None:
            fields["prompt_logprobs"] = prompt_logprobs_json(prompt_logprobs, self._tokens)
        return fields

    def _choice(self, index: int, piece: Piece, key: str, content: Json) -> Json:
        logprobs = None if piece.logprobs is None else chat_logprobs(piece.logprobs, self._tokens)
        return {"index": index, key: content, "logprobs": logprobs, **finish_json(piece)}


def _has_news(piece: Piece) -> bool:
    # Text held back (half a character, half a stop string) is not news; logprobs are.
    return bool(piece.text or piece.logprobs or piece.prompt_logprobs) or piece.finish is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Everything that one answer needs; `whole` or `events` is called once."""

    head: Head
    generations: tuple[Generation, ...]  # one per prompt
    shape: Shape
    generator: Generator
    metrics: GatewayMetrics
    include_usage: bool

    async def whole(self) -> Json:
        """The complete object.

        Raises:
            JserveError: the engine refused a generation, or failed.
        """
        choices: dict[tuple[int, int], ChoiceText] = {}
        async with aclosing(self._pieces()) as pieces:
            async for prompt, piece in pieces:
                choices.setdefault((prompt, piece.index), ChoiceText()).add(piece)
        done = {at: choices[at].whole() for at in sorted(choices)}
        json = self.head.json(
            self.shape.kind,
            [self.shape.choice(self._index(*at), at[0], piece) for at, piece in done.items()],
        )
        json["usage"] = self._usage(sum(len(piece.token_ids) for piece in done.values()))
        first = next((piece.prompt_logprobs for piece in done.values()), None)
        return json | self.shape.beside(first)

    async def events(self) -> AsyncGenerator[bytes, None]:
        """The same as server-sent events, without the closing one."""
        completion_tokens = 0
        async with aclosing(self._pieces()) as pieces:
            async for prompt, piece in pieces:
                completion_tokens += len(piece.token_ids)
                choice = self.shape.chunk(self._index(prompt, piece.index), prompt, piece)
                if choice is not None:
                    yield event(self._chunk([choice]) | self.shape.beside(piece.prompt_logprobs))
        if self.include_usage:
            yield event(self._chunk([]) | {"usage": self._usage(completion_tokens)})

    async def _pieces(self) -> AsyncGenerator[tuple[int, Piece], None]:
        """(prompt, piece), to the last piece of every choice."""
        unfinished = sum(generation.n for generation in self.generations)
        async with aclosing(interleaved(self._start())) as pieces:
            async for prompt, piece in pieces:
                if piece.finish is FinishReason.ERROR:
                    raise EngineError("the engine failed on this request")
                if piece.finish is FinishReason.ABORT:
                    break
                unfinished -= piece.finish is not None
                yield prompt, piece
        if unfinished:
            raise Unavailable("the server stopped this request; try again", retry_after_s=1.0)

    def _chunk(self, choices: list[Json]) -> Json:
        json = self.head.json(self.shape.chunk_kind, choices)
        if self.include_usage:
            json["usage"] = None
        return json

    def _start(self) -> list[TrackedPieces]:
        started: list[TrackedPieces] = []
        try:
            for generation in self.generations:
                pieces = self.generator.run(generation)
                started.append(self.metrics.track(generation, pieces))
        except BaseException:
            for pieces in started:
                pieces.close()
            raise
        return started

    def _index(self, prompt: int, choice: int) -> int:
        return prompt * self.generations[prompt].n + choice

    def _usage(self, completion_tokens: int) -> Json:
        return usage_json(sum(len(it.prompt.ids) for it in self.generations), completion_tokens)
