"""Reasoning before an answer: bounded in length, and free of the answer's grammar."""

from collections.abc import Sequence

from jserve.core.request import ConstraintSpec
from jserve.core.step import mask_words
from jserve.grammar.constraint import GrammarConstraint
from jserve.grammar.masks import ends_with, with_token


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
            return None if self._answer is None else with_token(self._answer.mask(), marker)
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
        known = next(n for n in range(len(end) - 1, -1, -1) if ends_with(self._tail, end[:n]))
        self._forced = list(end[known:])

    def _only(self, token: int) -> bytes | None:
        return with_token(bytes(4 * mask_words(self._vocab)), token)
