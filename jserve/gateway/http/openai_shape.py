"""JSON of completions and of chats, whole and streamed."""

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Protocol

from jserve.core.request import TokenLogprobs
from jserve.gateway.chat_reader import ChatDelta, ChatReader, WholeAnswer
from jserve.gateway.conversation import PreparedChat
from jserve.gateway.http.openai_response import (
    CompletionLogprobs,
    Json,
    TokenText,
    chat_logprobs,
    finish_json,
    prompt_logprobs_json,
)
from jserve.gateway.reasoning.format import ReasoningPart
from jserve.gateway.request_plane import GenerationRequest, OutputDelta
from jserve.gateway.tools.format import CallPart, TextPart


class Shape(Protocol):
    """JSON form of one route's answers."""

    kind: str
    chunk_kind: str
    reasoning_tokens: int  # of all choices so far

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
    reasoning_tokens = 0

    def __init__(
        self,
        generations: Sequence[GenerationRequest],
        tokens: TokenText,
        *,
        top: int | None,
        prompt_logprobs: bool,
        token_ids: bool = False,
    ) -> None:
        """`top` is the number of alternatives to answer; None: no log-probabilities."""
        self._generations = generations
        self._tokens = tokens
        self._top = top
        self._token_ids = token_ids
        self._begun: set[int] = set()  # choices whose prompt's ids were sent
        self._prompt_logprobs = prompt_logprobs  # whether requested by name, not only by echo
        self._logprobs: dict[int, CompletionLogprobs] = {}  # by choice

    def choice(self, index: int, prompt: int, delta: OutputDelta) -> Json:
        return {"prompt_logprobs": None, **self._choice(index, prompt, delta)}

    def chunk(self, index: int, prompt: int, delta: OutputDelta) -> Json | None:
        shown = _is_visible(delta) or (self._token_ids and delta.token_ids)
        return self._choice(index, prompt, delta) if shown else None

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
        if self._token_ids:
            choice["token_ids"] = delta.token_ids
            if index not in self._begun:
                self._begun.add(index)
                choice["prompt_token_ids"] = self._generations[prompt].prompt.ids
        return choice

    def _logprobs_of(self, index: int, prompt: int, delta: OutputDelta) -> Json | None:
        generation = self._generations[prompt]
        top = self._top
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

    def __init__(
        self,
        tokens: TokenText,
        prepared: PreparedChat,
        *,
        include_reasoning: bool = True,
        token_ids: bool = False,
        echo: str = "",
    ) -> None:
        """`echo` is a text that the content of every choice begins with."""
        self._tokens = tokens
        self._token_ids = token_ids
        self._sent_prompt = False
        self._echo = echo
        self._prepared = prepared
        self._include_reasoning = include_reasoning
        self._readers: dict[int, ChatReader] = {}  # by choice, once its role was sent
        self.reasoning_tokens = 0

    def choice(self, index: int, prompt: int, delta: OutputDelta) -> Json:
        read = self._read(self._prepared.reader(), delta)
        reasoning, text, calls = self._joined(read)
        text = self._echo + text
        message: Json = {
            "role": "assistant",
            "content": text if text or not calls else None,
            "refusal": None,
        }
        if self._prepared.formats.reasoning is not None:
            # vLLM has renamed the field; clients read one or the other.
            message |= {"reasoning_content": reasoning or None, "reasoning": reasoning or None}
        if calls:
            message["tool_calls"] = calls
        return self._choice(index, read, "message", message)

    def chunk(self, index: int, prompt: int, delta: OutputDelta) -> Json | None:
        reader, content = self._readers.get(index), Json()
        if reader is None:
            reader = self._readers[index] = self._prepared.reader()
            content = {"role": "assistant", "content": self._echo}
        read = self._read(reader, delta)
        found = self._delta(read)
        if content and "content" in found:
            found["content"] = self._echo + found["content"]
        content |= found
        if not content and not _has_more(delta) and not (self._token_ids and delta.token_ids):
            return None
        return self._choice(index, read, "delta", content)

    def beside(
        self, prompt_logprobs: Sequence[TokenLogprobs | None] | None, *, whole: bool
    ) -> Json:
        found = Json()
        if self._token_ids and not self._sent_prompt:
            self._sent_prompt = True
            found["prompt_token_ids"] = self._prepared.generation.prompt.ids
        if prompt_logprobs is not None:
            return found | {"prompt_logprobs": prompt_logprobs_json(prompt_logprobs, self._tokens)}
        return found | {"prompt_logprobs": None} if whole else found

    def _read(self, reader: ChatReader, delta: OutputDelta) -> ChatDelta:
        read = reader.feed(delta)
        self.reasoning_tokens += read.reasoning_tokens
        return read

    def _joined(self, read: ChatDelta) -> tuple[str, str, list[Json]]:
        """Reasoning, text and calls of a whole choice."""
        whole = WholeAnswer.of(read.parts)
        calls = [
            {
                "id": self._prepared.call_id(),
                "type": "function",
                "function": {"name": name, "arguments": arguments},
            }
            for name, arguments in whole.calls
        ]
        return whole.reasoning if self._include_reasoning else "", whole.text, calls

    def _delta(self, read: ChatDelta) -> Json:
        """Fields of a chunk's delta."""
        found = Json()
        calls: list[Json] = []
        for part in read.parts:
            match part:
                case ReasoningPart(text):
                    if self._include_reasoning:
                        text = found.get("reasoning_content", "") + text
                        found |= {"reasoning_content": text, "reasoning": text}
                case TextPart(text):
                    found["content"] = found.get("content", "") + text
                case CallPart():
                    calls.append(self._call(part))
        if calls:
            found["tool_calls"] = calls
        return found

    def _call(self, part: CallPart) -> Json:
        function: Json = {"arguments": part.arguments}
        if part.name is None:
            return {"index": part.index, "function": function}
        function = {"name": part.name, **function}
        call_id = self._prepared.call_id()
        return {"index": part.index, "id": call_id, "type": "function", "function": function}

    def _choice(self, index: int, read: ChatDelta, key: str, content: Json) -> Json:
        delta = read.delta
        logprobs = None if delta.logprobs is None else chat_logprobs(delta.logprobs, self._tokens)
        finish = {**finish_json(delta), "finish_reason": read.finish}
        choice = {"index": index, key: content, "logprobs": logprobs, **finish}
        return choice | {"token_ids": delta.token_ids} if self._token_ids else choice


def _is_visible(delta: OutputDelta) -> bool:
    # A delta is empty while half a character or half a stop string is held back.
    return bool(delta.text) or _has_more(delta)


def _has_more(delta: OutputDelta) -> bool:
    return bool(delta.logprobs or delta.prompt_logprobs) or delta.finish is not None
