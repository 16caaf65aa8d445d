"""Small questions about masks and tokens that several constraints ask."""

from collections.abc import Sequence


def with_token(mask: bytes | None, token: int) -> bytes | None:
    """The mask with one token more; None is every token."""
    if mask is None:
        return None
    words = bytearray(mask)
    words[token // 8] |= 1 << token % 8
    return bytes(words)


def ends_with(tokens: Sequence[int], end: Sequence[int]) -> bool:
    """Whether `tokens` end with `end`."""
    return len(end) <= len(tokens) and list(tokens[len(tokens) - len(end) :]) == list(end)
