"""The constraints of a request, as the scheduler asks for them (`scheduler.constraint`)."""

import threading
from collections.abc import Callable, Sequence

import numpy as np
from llguidance import LLMatcher

from jserve.core.errors import RequestError
from jserve.core.request import ConstraintSpec
from jserve.core.step import mask_words
from jserve.grammar.compiler import GrammarCompiler, first_line


class GrammarConstraint:
    """The output is a text of the grammar, which an end-of-sequence id ends.

    Where that id does not end the sequence (`ignore_eos`), anything may follow it. Masks decide
    alone: where the grammar leaves one text, they allow its canonical tokens only, though others
    spell it, too.
    """

    def __init__(self, matcher: LLMatcher, vocab: int, eos_token_ids: Sequence[int]) -> None:
        self._matcher = matcher
        self._words = np.zeros(mask_words(vocab), np.uint32)
        self._bytes = self._words.view(np.uint8).data
        self._is_current = False  # whether the words are the mask of the next token
        self._eos = frozenset(eos_token_ids)
        self._ended = False

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
            else:
                self._matcher.consume_token(token)
                self._is_current = False
        return len(tokens)

    def _compute(self) -> None:
        if not self._is_current:
            self._check()
            self._matcher.unsafe_compute_mask_ptr(self._words.ctypes.data, self._words.nbytes)
            self._check()
            self._is_current = True

    def _check(self) -> None:
        if self._matcher.is_error():
            message = first_line(self._matcher.get_error())
            raise RequestError(f"the grammar cannot go on: {message}", param="grammar")


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
    return list(tokens[len(tokens) - len(end) :]) == list(end)


def _with(mask: bytes | None, token: int) -> bytes | None:
    """The mask with one token more; None is every token."""
    if mask is None:
        return None
    words = bytearray(mask)
    words[token // 8] |= 1 << token % 8
    return bytes(words)


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

    def make(self, spec: ConstraintSpec) -> GrammarConstraint | ReasoningConstraint | None:
        """The constraint of one sequence, before its first token; None if nothing is bound.

        Compiling takes milliseconds or more, most of them without the GIL. Raises RequestError for
        a wrong grammar, ConfigError for a tokenizer without grammars.
        """
        grammar = None
        if spec.grammar:
            matcher = self._grammars().matcher(spec.grammar)
            grammar = GrammarConstraint(matcher, self._vocab, self._eos)
        if not spec.reasoning_end:
            return grammar
        return ReasoningConstraint(spec, grammar, vocab=self._vocab, eos_token_ids=self._eos)

    def _grammars(self) -> GrammarCompiler:
        with self._lock:
            if self._compiler is None:
                self._compiler = GrammarCompiler(
                    self._tokenizer_json(), vocab=self._vocab, eos_token_ids=self._eos
                )
            return self._compiler
