"""Constraints made up for tests: what may come next follows from the tokens so far."""

from collections.abc import Sequence

import numpy as np

from jserve.core.step import mask_words


class Rule:
    """After each token one in `step` of the ids may come, by the sum of the output so far.

    Nothing is bound before `start` output tokens, nor from `end` on; the output is complete at
    `end` if `ends`. `strict`: a token sampled without its mask never stands.
    """

    def __init__(
        self,
        vocab: int,
        *,
        step: int = 3,
        start: int = 0,
        end: int = 1 << 30,
        ends: bool = False,
        strict: bool = True,
    ) -> None:
        self.output: list[int] = []
        self.vocab, self.step, self.start, self.end, self.ends = vocab, step, start, end, ends
        self.strict = strict

    def mask(self) -> bytes | None:
        allowed = np.zeros(mask_words(self.vocab) * 32, bool)
        if len(self.output) >= self.end:
            if not self.ends:
                return None
        elif len(self.output) < self.start:
            return None
        else:
            allowed[: self.vocab] = self._allows(np.arange(self.vocab))
        return np.packbits(allowed, bitorder="little").tobytes()

    def accept(self, tokens: Sequence[int]) -> int:
        for count, token in enumerate(tokens):
            if len(self.output) >= self.end and self.ends:
                return count
            if self.start <= len(self.output) < self.end and not self._allows(token):
                return count
            if self.strict and count and len(self.output) == self.start:
                return count  # what follows was sampled without a mask
            self.output.append(token)
        return len(tokens)

    def _allows(self, token: int | np.ndarray) -> np.ndarray | bool:
        return (token + sum(self.output)) % self.step == 0
