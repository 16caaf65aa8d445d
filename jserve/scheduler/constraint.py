"""Constraints on the tokens of a sequence beyond what its sampling parameters say."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from jserve.core.request import SamplingParams


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


def ignores_masks(sampling: SamplingParams) -> bool:
    """Whether a token that is sampled without a mask, and allowed by it, is the one with it.

    The noise of a token depends on its position and id alone, so the best of all is the best of
    those allowed if it is one of them. Truncation looks at the others, too.
    """
    if sampling.temperature == 0:
        return True
    return sampling.top_k <= 0 and sampling.top_p == 1 and sampling.min_p == 0


def leaves_token(mask: bytes, sampling: SamplingParams, stop_ids: Sequence[int]) -> bool:
    """Whether the sampling parameters allow a token of `mask`.

    `stop_ids` are those that `min_tokens` forbids now.
    """
    words = np.frombuffer(mask, np.uint8)
    if not (stop_ids or sampling.allowed_token_ids or sampling.bad_token_ids):
        return bool(words.any())
    allowed = np.unpackbits(words, bitorder="little").astype(bool)
    allowed[list(stop_ids)] = False
    allowed[list(sampling.bad_token_ids)] = False
    if sampling.allowed_token_ids:
        return bool(allowed[list(sampling.allowed_token_ids)].any())
    return bool(allowed.any())
