"""The room that is left to a text which has to come to its end."""

from llguidance import LLMatcher

from jserve.core.errors import RequestError
from jserve.grammar.closing import Closing

_SPARE_TOKENS = 16  # with fewer to spare the way is looked for after each token
_LEAST_GROWTH = 8  # tokens by which one token may make the way longer: it opens what must be closed


class Room:
    """The tokens that a text may still have, and a way to its end that fits. Owned by one text.

    The way is looked for where it may matter: it takes a mask for each of its tokens.
    """

    def __init__(self, closing: Closing, matcher: LLMatcher, num_tokens: int) -> None:
        """`num_tokens` are those of the whole output, with the id that ends it.

        Raises RequestError if no text of the grammar is that short.
        """
        way = closing.way(matcher)
        if way is None or len(way) >= num_tokens:
            shortest = (
                "no end of it could be found"
                if way is None
                else f"the shortest that was found has {len(way) + 1}"
            )
            raise RequestError(
                f"max_tokens leaves {num_tokens} tokens, in which no text of the grammar ends: "
                f"{shortest}; raise it, or leave fit out",
                param="max_tokens",
            )
        self._closing = closing
        self.left = num_tokens
        self.way = way  # from where the text stood when it was looked for
        self.is_short = False  # whether nothing but the way may come
        self._unseen = 0  # tokens since then
        self._growth = max(_LEAST_GROWTH, len(way))  # of the way, by a token

    def take(self, matcher: LLMatcher, token: int) -> bool:
        """Whether the text can end in time after `token`; if not, only the way may come."""
        if not self._unseen and self.way[:1] == [token]:
            del self.way[0]
            self.left -= 1
            return True
        spare = self.left - len(self.way) - 1
        if spare > _SPARE_TOKENS + self._growth * (self._unseen + 1):
            self._unseen += 1
            self.left -= 1
            return True
        after = matcher.deep_copy()
        after.consume_token(token)
        way = self._closing.way(after)
        if way is not None and len(way) < self.left - 1:
            self.way, self._unseen = way, 0
            self.left -= 1
            return True
        # From where the text stands the way fits, unless tokens were more costly than thought.
        known = self._closing.way(matcher) if self._unseen else self.way
        if known is None or len(known) >= self.left:
            self.left -= 1
            return True
        self.way, self._unseen, self.is_short = known, 0, True
        return False
