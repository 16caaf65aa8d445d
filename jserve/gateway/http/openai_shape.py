"""JSON of completions and of chats, whole and streamed."""

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Protocol

from jserve.core.request import TokenLogprobs
from jserve.gateway.http.openai_response import (
    CompletionLogprobs,
    Json,
    TokenText,
    chat_logprobs,
    finish_json,
    prompt_logprobs_json,
)
from jserve.gateway.request_plane import GenerationRequest, OutputDelta


class Shape(Protocol):
    """JSON form of one route's answers."""

    kind: str
    chunk_kind: str

    def choice(self, index: int, prompt: int, delta: OutputDelta) -> Json:
        """Makes a whole choice from one delta that has all of it."""
        ...

    def chunk(self, index: int, prompt: int, delta: OutputDelta) -> Json | None:
        """Makes the choice of a chunk; None when the delta shows a client nothing new."""
        ...

    def beside(
        self, prompt_logprobs: Sequence[TokenLogprobs | None] | None, *, whole: bool
    ) -> Json:
        """Returns fields of the answer, or of a chunk if not `whole`, beside its choices."""
        ...


class CompletionShape:
    """JSON of `text_completion`. Owned by one answer."""

    kind = "text_completion"
    chunk_kind = "text_completion"

    def __init__(
        self, generations: Sequence[GenerationRequest], tokens: TokenText, *, prompt_logprobs: bool
    ) -> None:
        self._generations = generations
        self._tokens = tokens
        self._prompt_logprobs = prompt_logprobs  # whether requested by name, not only by echo
        self._logprobs: dict[int, CompletionLogprobs] = {}  # by choice

    def choice(self, index: int, prompt: int, delta: OutputDelta) -> Json:
        return {"prompt_logprobs": None, **self._choice(index, prompt, delta)}

    def chunk(self, index: int, prompt: int, delta: OutputDelta) -> Json | None:
        return self._choice(index, prompt, delta) if _is_visible(delta) else None

    def beside(
        self, prompt_logprobs: Sequence[TokenLogprobs | None] | None, *, whole: bool
    ) -> Json:
        return {}

    def _choice(self, index: int, prompt: int, delta: OutputDelta) -> Json:
        choice = {
            "index": index,
            "text": delta.text,
            "logprobs": self._logprobs_of(index, prompt, delta),
            **finish_json(delta),
        }
        if self._prompt_logprobs and delta.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs_json(delta.prompt_logprobs, self._tokens)
        return choice

    def _logprobs_of(self, index: int, prompt: int, delta: OutputDelta) -> Json | None:
        generation = self._generations[prompt]
        top = generation.sampling.logprobs
        if top is None:
            return None
        ids = delta.token_ids
        entries: Iterable[TokenLogprobs | None] = delta.logprobs or ()
        if generation.echo and delta.prompt_logprobs is not None:
            ids = generation.prompt.ids + ids
            entries = chain(delta.prompt_logprobs, entries)
        builder = self._logprobs.get(index)
        if builder is None:
            builder = self._logprobs[index] = CompletionLogprobs(self._tokens, top)
        return builder.add(ids, entries)


class ChatShape:
    """JSON of `chat.completion`. Owned by one answer."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def __init__(self, tokens: TokenText) -> None:
        self._tokens = tokens
        self._opened: set[int] = set()  # choices whose role was sent

    def choice(self, index: int, prompt: int, delta: OutputDelta) -> Json:
        message = {"role": "assistant", "content": delta.text, "refusal": None}
        return self._choice(index, delta, "message", message)

    def chunk(self, index: int, prompt: int, delta: OutputDelta) -> Json | None:
        if index not in self._opened:
            self._opened.add(index)
            content = {"role": "assistant", "content": delta.text}
        elif not _is_visible(delta):
            return None
        else:
            content = {"content": delta.text} if delta.text else {}
        return self._choice(index, delta, "delta", content)

    def beside(
        self, prompt_logprobs: Sequence[TokenLogprobs | None] | None, *, whole: bool
    ) -> Json:
        if prompt_logprobs is None:
            return {"prompt_logprobs": None} if whole else {}
        return {"prompt_logprobs": prompt_logprobs_json(prompt_logprobs, self._tokens)}

    def _choice(self, index: int, delta: OutputDelta, key: str, content: Json) -> Json:
        logprobs = None if delta.logprobs is None else chat_logprobs(delta.logprobs, self._tokens)
        return {"index": index, key: content, "logprobs": logprobs, **finish_json(delta)}


def _is_visible(delta: OutputDelta) -> bool:
    # A delta is empty while half a character or half a stop string is held back.
    return bool(delta.text or delta.logprobs or delta.prompt_logprobs) or delta.finish is not None
