"""Words that must not be generated → sequences of token ids that never come in a row."""

from collections.abc import Callable, Sequence

from jserve.core.errors import RequestError

_MAX_WORDS = 512  # the engine takes 1024 sequences, and a word gives up to two
_MAX_WORD_CHARS = 256
_MAX_WORD_TOKENS = 64  # of a sequence, as the engine has it


def bad_sequences(
    words: Sequence[str], encode: Callable[[str], tuple[int, ...]]
) -> tuple[tuple[int, ...], ...]:
    """Returns the spellings of the words at the beginning of a text and within it.

    As in vLLM, the spelling behind a space counts if it has as many tokens and another first one:
    else it contains the other spelling, or only adds a token for the space. `encode` adds no
    special tokens. Raises RequestError for an empty word, and for too many or too long ones.
    """
    if len(words) > _MAX_WORDS:
        message = f"bad_words has {len(words)} words; at most {_MAX_WORDS}"
        raise RequestError(message, param="bad_words")
    found: dict[tuple[int, ...], None] = {}
    for i, word in enumerate(words):
        stripped = word.lstrip()
        if not stripped:
            raise RequestError(f"bad_words[{i}] is empty; leave it out", param="bad_words")
        if len(word) > _MAX_WORD_CHARS:
            message = f"bad_words[{i}] has {len(word)} characters; at most {_MAX_WORD_CHARS}"
            raise RequestError(message, param="bad_words")
        alone, spaced = encode(stripped), encode(f" {stripped}")
        if not 0 < len(alone) <= _MAX_WORD_TOKENS:
            message = f"bad_words[{i}] is {len(alone)} tokens; it must be 1 to {_MAX_WORD_TOKENS}"
            raise RequestError(message, param="bad_words")
        found[alone] = None
        if len(spaced) == len(alone) and spaced[0] != alone[0]:
            found[spaced] = None
    return tuple(found)
