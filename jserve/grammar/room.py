"""The room that is left to a text which has to come to its end."""

from llguidance import LLMatcher

from jserve.core.errors import RequestError
from jserve.grammar.closing import Closing

_MOST_TOKENS = 256  # of the shortest text: a way is looked for again and again


class Room:
    """The tokens that a text may still have, and a way to its end that fits. Owned by one text.

    The way is looked for after each token that is not on it, at the cost of a mask for each of its
    tokens.
    """

    def __init__(self, closing: Closing, matcher: LLMatcher, num_tokens: int) -> None:
        """`num_tokens` are those of the whole output, with the id that ends it.

        Raises RequestError if no text of the grammar is that short.
        """
        way = closing.way(matcher)
        if way is None or len(way) >= num_tokens or len(way) > _MOST_TOKENS:
            shortest = (
                "no end of it could be found"
                if way is None
                else f"the shortest that was found has {len(way) + 1}"
            )
            raise RequestError(
                f"max_tokens leaves {num_tokens} tokens, in which no text of the grammar ends "
                f"(at most {_MOST_TOKENS} can be looked ahead): {shortest}; raise max_tokens, or "
                "leave fit out",
                param="max_tokens",
            )
        self._closing = closing
        self.left = num_tokens
        self.way = way  # from where the text stands; it fits
        self.is_short = False  # whether nothing but the way may come

    def take(self, matcher: LLMatcher, token: int, allowed: memoryview) -> bool:
        """Whether the text can end in time after `token`; if not, only the way may come.

        `allowed` is the mask of `token`.
        """
        if self.way[:1] == [token]:
            del self.way[0]
        elif self._closing.is_plain(token, allowed):  # the way out of a text stays as it is
            if len(self.way) >= self.left - 1:
                self.is_short = True
                return False
        else:
            after = matcher.deep_copy()
            after.consume_token(token)
            way = self._closing.way(after, self.left - 2)
            if way is None:
                self.is_short = True
                return False
            self.way = way
        self.left -= 1
        return True
