"""A short way from the middle of a grammar's text to an end of it."""

from collections.abc import Callable

import numpy as np
from llguidance import LLMatcher

from jserve.core.step import mask_words

# What ends JSON soonest, the best first: inside of a text, and elsewhere all that is open, then the
# shortest values, then what stands between them. Other grammars have their own letters, of which
# the longest tokens are taken.
_QUOTED = ('"}]}', '"}}', '"}]', '"]}', '"]', '"}', '",', '"')
_SOON = (
    *("}]}", "}}", "]}", "}]", "}", "]"),
    *('""', "[]", "{}", "0", "1", "null", "true", "false"),
    *('":""', '":[]', '":{}', '":"', '":', *_QUOTED, '","', ',"', ":", ",", '{"', '["', "{", "["),
)
_FEW = 4096  # allowed tokens of which the longest is taken; more are free text
_TRIED = 24  # of the shortest allowed tokens
_MOST_TOKENS = 512  # of a way


class Closing:
    """Finds ways to the end. Not the shortest of all, but close to it for JSON.

    One per tokenizer; safe to use from several threads.
    """

    def __init__(self, token_bytes: Callable[[int], bytes], vocab: int) -> None:
        self._texts = [token_bytes(token) for token in range(vocab)]
        ids = {text: token for token, text in reversed(list(enumerate(self._texts)))}
        self._quoted = [ids[text.encode()] for text in _QUOTED if text.encode() in ids]
        self._soon = [ids[text.encode()] for text in _SOON if text.encode() in ids]
        self._free = [ids[text] for text in (b"a", b"}") if text in ids]  # both are allowed in text
        self._lengths = np.array([len(text) for text in self._texts])
        blank = [not text.strip() for text in self._texts]
        self._lengths[blank] = 0  # they lead nowhere
        self._letter = ids.get(b"a")
        # Whole characters: behind half of one no quote may come.
        self._plain = [text.isascii() and not set(text) & set(b'"\\') for text in self._texts]

    def is_plain(self, token: int, allowed: memoryview) -> bool:
        """Whether `token` only goes on with a text in quotes, where anything may be written."""
        return self._is_text(allowed) and self._plain[token]

    def way(self, matcher: LLMatcher, most: int = _MOST_TOKENS) -> list[int] | None:
        """Tokens after which `matcher`, which stays where it is, accepts; None if none is found.

        There are at most `most`; the end-of-sequence id is none of them.
        """
        matcher = matcher.deep_copy()
        words = np.zeros(mask_words(len(self._texts)), np.uint32)
        allowed = words.view(np.uint8).data
        found: list[int] = []
        while not matcher.is_accepting():
            matcher.unsafe_compute_mask_ptr(words.ctypes.data, words.nbytes)
            if len(found) >= min(most, _MOST_TOKENS):
                return None
            token = self._next(matcher, allowed, words)
            if token is None or not matcher.consume_token(token):
                return None
            found.append(token)
        return found if len(found) <= most else None

    def _is_text(self, allowed: memoryview) -> bool:
        return len(self._free) == 2 and all(
            allowed[token // 8] >> token % 8 & 1 for token in self._free
        )

    def _next(self, matcher: LLMatcher, allowed: memoryview, words: np.ndarray) -> int | None:
        def may_come(token: int) -> bool:
            return bool(allowed[token // 8] >> token % 8 & 1)

        is_text = self._is_text(allowed)
        token = next(filter(may_come, self._quoted if is_text else self._soon), None)
        if token is not None or is_text:
            return self._letter if token is None else token
        bits = np.unpackbits(words.view(np.uint8), bitorder="little", count=len(self._texts))
        (ids,) = np.nonzero(bits)
        if not ids.size:
            return None
        shortest = ids[np.argsort(self._lengths[ids], kind="stable")[:_TRIED]]
        for token in shortest.tolist():  # one of them may be the last
            after = matcher.deep_copy()
            if after.consume_token(token) and after.is_accepting():
                return token
        if ids.size > _FEW and self._letter is not None and bits[self._letter]:
            return self._letter
        return int(ids[np.argmax(self._lengths[ids])])
