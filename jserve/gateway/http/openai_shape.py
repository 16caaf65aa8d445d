"""How the pieces of completions and of chats look in JSON, whole and streamed."""

from collections.abc import Sequence
from typing import Protocol

from jserve.core.request import TokenLogprobs
from jserve.gateway.generation import Generation, Piece
from jserve.gateway.http.openai_response import (
    CompletionLogprobs,
    Json,
    TokenText,
    chat_logprobs,
    finish_json,
    prompt_logprobs_json,
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
