"""Tokens that never come in a row."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from jserve.core.step import mask_words
from jserve.grammar.masks import ends_with


class _Rest(Protocol):
    """Another constraint; see `scheduler.constraint`."""

    def mask(self) -> bytes | None: ...

    def accept(self, tokens: Sequence[int]) -> int: ...


class BadSequences:
    """Keeps tokens from coming in a row, beside what `rest` binds.

    Only the last token of a sequence is ever forbidden, where the others have come.
    """

    def __init__(
        self,
        sequences: Sequence[tuple[int, ...]],
        rest: _Rest | None,
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
        return [it[-1] for it in self._sequences if ends_with(tail, it[:-1])]
