"""A grammar as a constraint, as the scheduler asks for it (`scheduler.constraint`)."""

from collections.abc import Sequence

import numpy as np
from llguidance import LLMatcher

from jserve.core.errors import RequestError
from jserve.core.step import mask_words
from jserve.grammar.compiler import first_line
from jserve.grammar.room import Room


class GrammarConstraint:
    """The output is a text of the grammar, which an end-of-sequence id ends.

    Where that id does not end the sequence (`ignore_eos`), anything may follow it. Masks decide
    alone: where the grammar leaves one text, they allow its canonical tokens only, though others
    spell it, too.
    """

    def __init__(
        self,
        matcher: LLMatcher,
        vocab: int,
        eos_token_ids: Sequence[int],
        room: Room | None = None,
    ) -> None:
        """With `room` the text comes to its end within it."""
        self._matcher = matcher
        self._words = np.zeros(mask_words(vocab), np.uint32)
        self._bytes = self._words.view(np.uint8).data
        self._is_current = False  # whether the words are the mask of the next token
        self._eos = frozenset(eos_token_ids)
        self._ended = False
        self._room = room

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
            if self._room is not None and not self._room.take(self._matcher, token, self._bytes):
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
