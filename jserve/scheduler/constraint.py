"""Constraints on the tokens of a sequence beyond what its sampling parameters say."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from jserve.core.errors import RequestError
from jserve.core.request import SamplingParams

_TRUSTED_TOKENS = 4  # in a row that stand make one good that did not
_MAX_CAUTION = 5  # 2^5 masked tokens after as many that did not stand


class Constraint(Protocol):
    """What a sequence may generate, token by token. Owned by one sequence; used by one thread.

    It sees every token of the output, in order, and only those that stand. Its methods raise
    RequestError where it can't go on; that ends the sequence.
    """

    def mask(self) -> bytes | None:
        """The tokens that may come next, as in `MaskRow.words`; None if any may.

        A mask without a token says that the output is complete, or cannot go on.
        """
        ...

    def accept(self, tokens: Sequence[int]) -> int:
        """Takes sampled tokens, and returns how many of them stand: all, or those before a wrong.

        The others were sampled without the mask that belongs to them, and are sampled again.
        """
        ...


class Bound:
    """The constraint of a sequence, and what its rows in flight may be worth.

    A mask holds for one token, and the result before it tells it. So a bound row waits for its
    results, unless it runs ahead: beside rows that are free, which have many decode steps in a run
    anyway, it samples without masks, and goes on from the first token that does not stand. Tokens
    are the same: the noise of a token depends on its position and id alone, so the best of all is
    the best of those allowed if it is one of them. Truncation looks at the others, too, so rows
    with it never run ahead.
    """

    def __init__(
        self,
        constraint: Constraint,
        sampling: SamplingParams,
        num_output: int,
        eos_token_ids: tuple[int, ...],
    ) -> None:
        """`num_output` counts the tokens that `constraint` has taken already.

        Raises RequestError if no token may follow.
        """
        self._constraint = constraint
        self._sampling = sampling
        self._stop_ids = (*eos_token_ids, *sampling.stop_token_ids)
        self._is_whole = sampling.temperature == 0 or (
            sampling.top_k <= 0 and sampling.top_p == 1 and sampling.min_p == 0
        )
        self._restricts = bool(sampling.allowed_token_ids or sampling.bad_token_ids)
        self._num_output = num_output
        self._last_cut = -1  # number of output tokens
        self._same_cuts = 0  # cuts in a row at that number
        self._num_cuts = 0  # that were not made good by tokens that stood
        self._cautious = 0  # tokens until it runs ahead again
        self.num_unknown = 0  # rows in flight whose tokens will be asked for
        self.num_stale = 0  # rows in flight behind a token that does not stand
        self.mask: bytes | None = None  # of the next token after those known; None: any
        if not self.next_mask():
            raise RequestError(
                "the constraint and the sampling parameters together leave no token to generate",
                param="grammar",
            )

    @property
    def runs_ahead(self) -> bool:
        """Whether tokens may be sampled without the masks that belong to them."""
        return self.mask is None or (self._is_whole and not self._cautious)

    def may_decode(self, steps: int, *, beside_free: bool) -> int:
        """Tokens that a decode row may yield in a run of `steps`; 0: it waits for a result."""
        if self.mask is None or (beside_free and self.runs_ahead):
            return steps
        return 0 if self.num_unknown else 1

    def issue(self) -> bytes | None:
        """Counts a row that yields tokens; returns its mask, if there is one and it is known."""
        mask = None if self.num_unknown else self.mask
        self.num_unknown += 1
        return mask

    def accept(self, new: Sequence[int]) -> int:
        """Takes the tokens of the oldest row; returns how many stand.

        Raises RequestError if none does, again and again.
        """
        self.num_unknown -= 1
        stand = self._constraint.accept(new)
        self._num_output += stand
        self._cautious = max(0, self._cautious - stand)
        if stand == len(new):
            if stand >= _TRUSTED_TOKENS:
                self._num_cuts = max(0, self._num_cuts - 1)
            return stand
        # At first without its mask, then with it; a constraint may also look further than that.
        self._same_cuts = self._same_cuts + 1 if self._num_output == self._last_cut else 0
        if self._same_cuts > 1:
            raise RequestError("no token that was sampled stands", param="grammar")
        self._last_cut = self._num_output
        self._num_cuts = min(self._num_cuts + 1, _MAX_CAUTION)
        self._cautious = 1 << self._num_cuts
        return stand

    def next_mask(self) -> bool:
        """Asks what may come next; False if nothing may."""
        self.mask = mask = self._constraint.mask()
        return mask is None or self._leaves_token(np.frombuffer(mask, np.uint8))

    def force(self, most: int) -> list[int]:
        """Takes the tokens that must come next, up to `most`, for which no step is needed.

        None that may end the sequence; none if their log-probabilities are asked for.
        """
        forced: list[int] = []
        if self._sampling.logprobs is not None or self._restricts:
            return forced
        while len(forced) < most and self.mask is not None:
            token = _only_token(self.mask)
            if token is None or token in self._stop_ids:
                break
            forced.append(token)
            self._num_output += self._constraint.accept((token,))
            self.mask = self._constraint.mask()
        return forced

    def drop_rows(self, num_in_flight: int) -> None:
        """Gives up the rows in flight: they follow what does not stand, or lack their mask."""
        self.num_stale, self.num_unknown = num_in_flight, 0

    def _leaves_token(self, words: np.ndarray) -> bool:
        sampling = self._sampling
        early = self._num_output < sampling.min_tokens
        if not (early or self._restricts):
            return bool(words.any())
        allowed = np.unpackbits(words, bitorder="little").astype(bool)
        allowed[list(sampling.bad_token_ids)] = False
        if early:
            allowed[list(self._stop_ids)] = False
        if sampling.allowed_token_ids:
            allowed = allowed[list(sampling.allowed_token_ids)]
        return bool(allowed.any())


def _only_token(mask: bytes) -> int | None:
    """The one token of a mask; None if it has several."""
    bits = int.from_bytes(mask, "little")
    return bits.bit_length() - 1 if bits and not bits & (bits - 1) else None
