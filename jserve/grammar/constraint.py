"""The constraints of a request, as the scheduler asks for them (`scheduler.constraint`)."""

import threading
from collections.abc import Callable, Sequence

import numpy as np
from llguidance import LLMatcher

from jserve.core.errors import RequestError
from jserve.core.request import ConstraintSpec
from jserve.core.step import mask_words
from jserve.grammar.closing import Closing
from jserve.grammar.compiler import GrammarCompiler, first_line

_NEAR_TOKENS = 64  # beside four times the way to the end: each token is looked at
_SELDOM_TOKENS = 16


class GrammarConstraint:
    """The output is a text of the grammar, which an end-of-sequence id ends.

    Where that id does not end the sequence (`ignore_eos`), anything may follow it. Masks decide
    alone: where the grammar leaves one text, they allow its canonical tokens only, though others
    spell it, too.
    """

    def __init__(
        self, matcher: LLMatcher, vocab: int, eos_token_ids: Sequence[int], room: "Room | None"
    ) -> None:
        """With `room` the text comes to its end within it.

        Raises RequestError if the grammar has no text that short.
        """
        self._matcher = matcher
        self._words = np.zeros(mask_words(vocab), np.uint32)
        self._bytes = self._words.view(np.uint8).data
        self._is_current = False  # whether the words are the mask of the next token
        self._eos = frozenset(eos_token_ids)
        self._ended = False
        self._room = room
        if room is not None:
            room.begin(matcher)

    def mask(self) -> bytes | None:
        """The tokens that go on with a text of the grammar; None behind its end.

        Raises RequestError where the grammar has become too complex for its limits.
        """
        if self._ended:
            return None
        self._compute()
        if not self._words.any():
            raise RequestError("the grammar has come to a dead end", param="grammar")
        return self._words.tobytes()

    def accept(self, tokens: Sequence[int]) -> int:
        """Takes tokens up to the first that its mask does not allow; raises as `mask` does."""
        for count, token in enumerate(tokens):
            if self._ended:
                return len(tokens)
            self._compute()
            if not self._bytes[token // 8] >> token % 8 & 1:
                return count
            if token in self._eos:
                self._ended = True  # the matcher itself refuses it where nothing else may come
                continue
            if self._room is not None and not self._room.take(self._matcher, token):
                self._is_current = False
                return count
            self._matcher.consume_token(token)
            self._is_current = False
        return len(tokens)

    def note_other_token(self) -> None:
        """Counts a token before the text, which leaves less room to it."""
        if self._room is not None:
            self._room.left -= 1

    def is_pressed(self, num_others: int) -> bool:
        """Whether the text must begin after `num_others` more tokens, or not end in time."""
        return self._room is not None and self._room.left <= len(self._room.way) + num_others + 2

    def _compute(self) -> None:
        if self._is_current:
            return
        self._check()
        self._matcher.unsafe_compute_mask_ptr(self._words.ctypes.data, self._words.nbytes)
        self._check()
        self._is_current = True
        if self._room is not None and self._room.is_short:
            only = np.zeros_like(self._words)
            for token in self._room.way[:1] or self._eos:
                only[token // 32] |= np.uint32(1 << token % 32)
            self._words &= only

    def _check(self) -> None:
        if self._matcher.is_error():
            message = first_line(self._matcher.get_error())
            raise RequestError(f"the grammar cannot go on: {message}", param="grammar")


class Room:
    """The tokens that a text may still have, and a way to its end that fits.

    The way is looked for only where it may matter: often near the end, seldom before.
    """

    def __init__(self, closing: Closing, num_tokens: int) -> None:
        """`num_tokens` are those of the whole output, with the id that ends it."""
        self._closing = closing
        self.left = num_tokens
        self._known = 0  # tokens of the latest way
        self._unseen = 0  # tokens since it was found
        self.way: list[int] = []  # from where the text stands, once it is short
        self.is_short = False  # whether nothing but the way may come

    def begin(self, matcher: LLMatcher) -> None:
        """Raises RequestError if no text of the grammar fits."""
        way = self._closing.way(matcher)
        if way is None or len(way) >= self.left:
            least = "it has no end that could be found" if way is None else f"{len(way) + 1} tokens"
            raise RequestError(
                f"max_tokens leaves {self.left} tokens, in which no text of the grammar ends: "
                f"the shortest has {least}; raise it, or leave fit out",
                param="max_tokens",
            )
        self.way, self._known = way, len(way)

    def take(self, matcher: LLMatcher, token: int) -> bool:
        """Whether the text can end in time after `token`; if not, only the way may come."""
        if self.is_short:
            del self.way[:1]
            self.left -= 1
            return True
        self._unseen += 1
        if self.left > 4 * self._known + _NEAR_TOKENS and self._unseen < _SELDOM_TOKENS:
            self.left -= 1
            return True
        after = matcher.deep_copy()
        after.consume_token(token)
        way = self._closing.way(after)
        if way is None or len(way) >= self.left - 1:
            # The way of the token before fits, if it was looked for.
            known = self._closing.way(matcher) if self._unseen > 1 else self.way
            if known is None:
                return True
            self.way, self.is_short = known, True
            return False
        self.way, self._known, self._unseen = way, len(way), 0
        self.left -= 1
        return True


class ReasoningConstraint:
    """Lets reasoning be, for so many tokens at most, and binds what follows it.

    An end-of-sequence id in the reasoning ends just that, if a grammar waits behind it.
    """

    def __init__(
        self,
        spec: ConstraintSpec,
        answer: GrammarConstraint | None,
        *,
        vocab: int,
        eos_token_ids: Sequence[int],
    ) -> None:
        """`answer` binds the text after the reasoning, or the whole if there is none."""
        self._spec = spec
        self._answer = answer
        self._vocab = vocab
        self._eos = frozenset(eos_token_ids)
        self._begun = 0  # tokens of the marker that begins it
        self._num_tokens = 0  # of the reasoning, without markers
        self._tail: list[int] = []  # its latest tokens, fewer than the marker that ends it
        self._forced: list[int] = []  # tokens of that marker which must come now
        self._over = False
        self._force_if_spent()

    def mask(self) -> bytes | None:
        """A marker's next token where it must come, else what the grammar allows after it."""
        if self._over:
            return None if self._answer is None else self._answer.mask()
        if self._forced:
            return self._only(self._forced[0])
        if self._starts:
            marker = self._spec.reasoning_start[self._begun]
            if self._begun:
                return self._only(marker)
            return None if self._answer is None else _with(self._answer.mask(), marker)
        return None

    def accept(self, tokens: Sequence[int]) -> int:
        """Takes tokens; none stands that was sampled without the mask which it needs."""
        for count, token in enumerate(tokens):
            if self._over:
                return count + self._accept_answer(tokens[count:], is_masked=count == 0)
            if not self._take(token):
                return count
            if self._answer is not None:
                self._answer.note_other_token()
        return len(tokens)

    @property
    def _starts(self) -> bool:
        return self._begun < len(self._spec.reasoning_start)

    def _accept_answer(self, tokens: Sequence[int], *, is_masked: bool) -> int:
        if self._answer is None:
            return len(tokens)
        return self._answer.accept(tokens) if is_masked else 0

    def _take(self, token: int) -> bool:
        """Goes on by one token before the answer; False if it does not stand."""
        if self._forced:
            if token != self._forced[0]:
                return False
            del self._forced[0]
            self._over = not self._forced
            return True
        if self._starts:
            return self._take_start(token)
        if token in self._eos and self._answer is not None:
            self._force_end()
            return False
        end = self._spec.reasoning_end
        self._tail = [*self._tail, token][-len(end) :]
        if self._tail == list(end):
            self._over = True
            return True
        self._num_tokens += 1
        self._force_if_spent()
        if not self._forced and self._answer is not None and self._answer.is_pressed(len(end)):
            self._force_end()
        return True

    def _take_start(self, token: int) -> bool:
        if token == self._spec.reasoning_start[self._begun]:
            self._begun += 1
            return True
        if self._begun:
            return False
        self._over = True  # the answer begins without reasoning
        return self._answer is None or self._answer.accept((token,)) == 1

    def _force_if_spent(self) -> None:
        most = self._spec.max_reasoning_tokens
        if most is not None and self._num_tokens >= most and not self._starts:
            self._force_end()

    def _force_end(self) -> None:
        """Lets nothing come but the end, or what is missing of it."""
        end = self._spec.reasoning_end
        known = next(n for n in range(len(end) - 1, -1, -1) if _ends_with(self._tail, end[:n]))
        self._forced = list(end[known:])

    def _only(self, token: int) -> bytes | None:
        return _with(bytes(4 * mask_words(self._vocab)), token)


def _ends_with(tokens: Sequence[int], end: Sequence[int]) -> bool:
    return len(end) <= len(tokens) and list(tokens[len(tokens) - len(end) :]) == list(end)


def _with(mask: bytes | None, token: int) -> bytes | None:
    """The mask with one token more; None is every token."""
    if mask is None:
        return None
    words = bytearray(mask)
    words[token // 8] |= 1 << token % 8
    return bytes(words)


class BadSequences:
    """Keeps tokens from coming in a row, beside what `rest` binds.

    Only the last token of a sequence is ever forbidden, where the others have come.
    """

    def __init__(
        self,
        sequences: Sequence[tuple[int, ...]],
        rest: GrammarConstraint | ReasoningConstraint | None,
        vocab: int,
    ) -> None:
        self._sequences = sequences
        self._rest = rest
        self._all = np.zeros(mask_words(vocab) * 32, bool)
        self._all[:vocab] = True
        self._tail: list[int] = []  # as many of the latest tokens as may matter
        self._longest = max(map(len, sequences))

    def mask(self) -> bytes | None:
        """What `rest` allows, without the tokens that would end a sequence; None for everything."""
        mask = None if self._rest is None else self._rest.mask()
        bad = self._bad(self._tail)
        if not bad:
            return mask
        if mask is None:
            allowed = self._all.copy()
        else:
            allowed = np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little").astype(bool)
        allowed[bad] = False
        return np.packbits(allowed, bitorder="little").tobytes()

    def accept(self, tokens: Sequence[int]) -> int:
        """Takes tokens up to one behind which a mask is needed: the others were sampled without."""
        tails = [self._tail]
        for count, token in enumerate(tokens):
            bad = self._bad(tails[-1])
            if token in bad or (bad and count):
                break
            tails.append([*tails[-1], token][-self._longest :])
        stand = len(tails) - 1
        if self._rest is not None:
            stand = self._rest.accept(tokens[:stand])
        self._tail = tails[stand]
        return stand

    def _bad(self, tail: Sequence[int]) -> list[int]:
        return [it[-1] for it in self._sequences if _ends_with(tail, it[:-1])]


class ConstraintMaker:
    """Makes the constraints of an engine's sequences. Safe to use from several threads.

    The tokenizer is read when the first grammar comes: most engines never see one.
    """

    def __init__(
        self, tokenizer_json: Callable[[], str], *, vocab: int, eos_token_ids: tuple[int, ...]
    ) -> None:
        self._tokenizer_json = tokenizer_json
        self._vocab, self._eos = vocab, eos_token_ids
        self._lock = threading.Lock()
        self._compiler: GrammarCompiler | None = None

    def make(
        self, spec: ConstraintSpec, max_tokens: int
    ) -> GrammarConstraint | ReasoningConstraint | BadSequences | None:
        """The constraint of one sequence, before its first token; None if nothing is bound.

        Compiling takes milliseconds or more, most of them without the GIL. Raises RequestError for
        a wrong grammar, ConfigError for a tokenizer without grammars.
        """
        grammar = None
        if spec.grammar:
            compiler = self._grammars()
            room = Room(compiler.closing, max_tokens) if spec.fit else None
            matcher = compiler.matcher(spec.grammar)
            grammar = GrammarConstraint(matcher, self._vocab, self._eos, room)
        bound = grammar
        if spec.reasoning_end:
            bound = ReasoningConstraint(spec, grammar, vocab=self._vocab, eos_token_ids=self._eos)
        if spec.bad_sequences:
            return BadSequences(spec.bad_sequences, bound, self._vocab)
        return bound

    def _grammars(self) -> GrammarCompiler:
        with self._lock:
            if self._compiler is None:
                self._compiler = GrammarCompiler(
                    self._tokenizer_json(), vocab=self._vocab, eos_token_ids=self._eos
                )
            return self._compiler
