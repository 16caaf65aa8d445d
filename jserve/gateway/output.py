"""One choice of a generation: updates of token ids in, deltas of text out. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import NamedTuple

from jserve.core.logprobs import PackedLogprobs
from jserve.core.request import (
    ConstraintSpec,
    FinishReason,
    SamplingParams,
    SequenceUpdate,
    TokenLogprobs,
)
from jserve.gateway.buffers import logprobs_bytes
from jserve.gateway.stop_strings import StopMatcher
from jserve.gateway.tenants import LOCAL, Caller
from jserve.gateway.tokenizer import TextTokenizer


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids, and the text they came from when it was text."""

    ids: tuple[int, ...]
    text: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """A front end's request, validated, every field resolved."""

    id: str
    prompt: Prompt
    sampling: SamplingParams
    stop: tuple[str, ...] = ()
    n: int = 1
    priority: int = 0
    caller: Caller = LOCAL
    echo: bool = False  # the text of each choice starts with the prompt's text
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    shown_tokens: frozenset[int] = frozenset()  # special tokens that are text all the same
    prompt_only: bool = False  # max_tokens was 0: the one generated token is not shown
    cache_salt: str = field(default="", repr=False)
    constraint: ConstraintSpec | None = None  # on every choice


class OutputDelta(NamedTuple):
    """New output of one choice. A tuple: each step makes one per choice.

    `text` may lag behind `token_ids` while half a character or half a stop string is held back;
    the concatenation of all texts is the answer. `token_ids`, and `logprobs` parallel to it, run
    to the token that completed a stop string; their number is the usage.
    """

    index: int  # choice  # pyright: ignore[reportIncompatibleMethodOverride]
    text: str
    token_ids: tuple[int, ...]
    logprobs: Sequence[TokenLogprobs] | None = None  # when requested
    prompt_logprobs: Sequence[TokenLogprobs | None] | None = None  # on the first delta
    finish: FinishReason | None = None  # on the last delta of the choice
    stop_reason: str | int | None = None  # stop string or stop_token_id; None for end of sequence
    queue_s: float | None = None  # on the first delta
    ttft_s: float | None = None  # on the first delta: from `run` to the first token
    cached_tokens: int = 0  # on the first delta: prompt tokens that were not computed


def delta_bytes(delta: OutputDelta) -> int:
    """Memory that a delta takes while it is held, roughly."""
    logprobs = sum(map(logprobs_bytes, (delta.logprobs, delta.prompt_logprobs)))
    return len(delta.text) + 4 * len(delta.token_ids) + logprobs


def num_logprobs(delta: OutputDelta) -> int:
    """Number of log-probabilities: of tokens and of their alternatives."""
    return sum(map(_num_entries, (delta.logprobs, delta.prompt_logprobs)))


def _num_entries(logprobs: Sequence[TokenLogprobs | None] | None) -> int:
    if isinstance(logprobs, PackedLogprobs):
        return logprobs.num_entries
    return sum(1 + len(entry.top) for entry in logprobs or () if entry is not None)


def join(deltas: Sequence[OutputDelta]) -> OutputDelta:
    """Joins all deltas of one choice, in order, to one delta."""
    first, last = deltas[0], deltas[-1]
    scored = [delta.logprobs for delta in deltas if delta.logprobs is not None]
    return first._replace(
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(chain.from_iterable(delta.token_ids for delta in deltas)),
        logprobs=_joined(scored) if scored else None,
        finish=last.finish,
        stop_reason=last.stop_reason,
    )


def _joined(scored: Sequence[Sequence[TokenLogprobs]]) -> Sequence[TokenLogprobs]:
    """All positions in order, packed if they are."""
    if not isinstance(scored[0], PackedLogprobs):
        return tuple(chain.from_iterable(scored))
    joined = PackedLogprobs[TokenLogprobs]()
    for positions in scored:
        joined.extend(positions)
    return joined


def echoed(generation: GenerationRequest, tokenizer: TextTokenizer) -> str:
    """The text before the output of each choice: the prompt's, where it is asked for.

    A prompt of ids is echoed as it was given, its special tokens too. A character that it leaves
    unfinished is completed by the output.
    """
    prompt = generation.prompt
    if not generation.echo:
        return ""
    if prompt.text is not None:
        return prompt.text
    return tokenizer.detokenizer(skip_special_tokens=False).push(prompt.ids)


class OutputProcessor:
    """Turns the updates of one sequence into deltas; owned by whoever reads the updates.

    The text of a stop token is left out, as is a stop string and all that follows it, unless
    `include_stop_str_in_output`. Stop strings are looked for after `min_tokens` tokens.
    """

    def __init__(
        self,
        generation: GenerationRequest,
        index: int,
        tokenizer: TextTokenizer,
        head: str | None = None,
    ) -> None:
        """`head` is `echoed` of the generation, which its choices share; None: it is made here."""
        self._generation = generation
        self._index = index
        self._matcher = StopMatcher(generation.stop) if generation.stop else None
        self._num_tokens = 0
        self._unsettled: list[tuple[int, TokenLogprobs | None]] = []
        self._ends: list[int] = []  # for each, the characters fed to the matcher so far
        self._fed_chars = 0
        self._head = echoed(generation, tokenizer) if head is None else head
        self._detokenizer = tokenizer.detokenizer(
            skip_special_tokens=generation.skip_special_tokens,
            shown_tokens=generation.shown_tokens,
            prompt=generation.prompt.ids,
        )

    def feed(self, update: SequenceUpdate) -> OutputDelta:
        """Returns the delta for an update; it may finish though the update does not."""
        if self._generation.prompt_only:
            return self._prompt_delta(update)
        head, self._head = self._head, ""
        if self._matcher is None:
            shown = update.tokens
            if self._ends_with_stop_token(update):
                shown = shown[:-1]
            text = self._detokenizer.push(shown)
            if update.finish is not None:
                text += self._detokenizer.flush()
            tokens, logprobs, match = update.tokens, update.logprobs, None
        else:
            text = self._match(self._matcher, update)
            tokens, logprobs = self._take_settled(self._matcher, update)
            match = self._matcher.match
        if match is not None and self._generation.include_stop_str_in_output:
            text += match.stop
        return OutputDelta(
            index=self._index,
            text=head + text,
            token_ids=tokens,
            logprobs=logprobs,
            prompt_logprobs=update.prompt_logprobs,
            finish=update.finish if match is None else FinishReason.STOP,
            stop_reason=self._stop_token(update) if match is None else match.stop,
            queue_s=update.queue_s,
            cached_tokens=update.cached_tokens,
        )

    def _match(self, matcher: StopMatcher, update: SequenceUpdate) -> str:
        """Feeds the tokens one by one and returns the text that is released."""
        released: list[str] = []
        logprobs = update.logprobs or (None,) * len(update.tokens)
        last = len(update.tokens) - 1 if self._ends_with_stop_token(update) else -1
        for i, token in enumerate(update.tokens):
            text = "" if i == last else self._detokenizer.push((token,))
            self._num_tokens += 1
            if self._num_tokens <= self._generation.sampling.min_tokens:
                released.append(text)
            else:
                self._fed_chars += len(text)
                released.append(matcher.feed(text))
            self._unsettled.append((token, logprobs[i]))
            self._ends.append(self._fed_chars)
            if matcher.match is not None:
                return "".join(released)
        if update.finish is not None:
            released += (matcher.feed(self._detokenizer.flush()), matcher.flush())
        return "".join(released)

    def _take_settled(
        self, matcher: StopMatcher, update: SequenceUpdate
    ) -> tuple[tuple[int, ...], Sequence[TokenLogprobs] | None]:
        """Takes the tokens that belong to the answer for certain; the rest waits."""
        count = len(self._unsettled) if matcher.settled or update.finish is not None else 0
        if (match := matcher.match) is not None:
            # The last token is the one that completed the stop string.
            until = next((i for i, end in enumerate(self._ends) if end >= match.end), count - 1)
            count = until + 1
        taken = list(islice(self._unsettled, count))
        del self._unsettled[:count], self._ends[:count]
        tokens = tuple(token for token, _ in taken)
        if self._generation.sampling.logprobs is None:
            return tokens, None
        scored = (logprobs for _, logprobs in taken if logprobs is not None)
        return tokens, PackedLogprobs(scored)

    def _ends_with_stop_token(self, update: SequenceUpdate) -> bool:
        return (
            update.finish is FinishReason.STOP
            and bool(update.tokens)
            and not self._generation.include_stop_str_in_output
        )

    def _stop_token(self, update: SequenceUpdate) -> int | None:
        """The id of `stop_token_ids` that ended the sequence."""
        if update.finish is not FinishReason.STOP or not update.tokens:
            return None
        last = update.tokens[-1]
        return last if last in self._generation.sampling.stop_token_ids else None

    def _prompt_delta(self, update: SequenceUpdate) -> OutputDelta:
        """Returns the prompt's text and log-probabilities, without output."""
        return OutputDelta(
            index=self._index,
            text=self._head + (self._detokenizer.flush() if self._generation.echo else ""),
            token_ids=(),
            logprobs=None if self._generation.sampling.logprobs is None else (),
            prompt_logprobs=update.prompt_logprobs,
            finish=FinishReason.LENGTH if update.finish is FinishReason.STOP else update.finish,
            queue_s=update.queue_s,
            cached_tokens=update.cached_tokens,
        )
