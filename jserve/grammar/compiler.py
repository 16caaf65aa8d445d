"""Compiles grammars against a tokenizer, with llguidance."""

import threading
from collections import OrderedDict
from functools import cached_property

from llguidance import LLMatcher, LLTokenizer

from jserve.core.errors import ConfigError, RequestError
from jserve.grammar.closing import Closing

_MAX_KEPT_CHARS = 4 << 20  # of the texts of compiled grammars


class GrammarCompiler:
    """Makes matchers of grammars. Safe to use from several threads.

    Compiling releases the GIL. The latest grammars are kept: the choices of one request, and most
    requests of one client, have the same.
    """

    def __init__(self, tokenizer_json: str, *, vocab: int, eos_token_ids: tuple[int, ...]) -> None:
        """`vocab` counts the logits of the model, which may be more than the tokenizer has.

        Raises ConfigError for a tokenizer that llguidance does not know.
        """
        if not eos_token_ids:
            raise ConfigError("the model has no end-of-sequence id, which ends a grammar's text")
        try:
            self.tokenizer = LLTokenizer(
                tokenizer_json, n_vocab=vocab, eos_token=list(eos_token_ids)
            )
        except ValueError as error:
            raise ConfigError(f"llguidance does not know this tokenizer: {error}") from error
        self.vocab = vocab
        self.eos_token_ids = eos_token_ids
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, LLMatcher] = OrderedDict()
        self._kept_chars = 0

    @cached_property
    def closing(self) -> Closing:
        """Finds ways to the ends of grammars over this tokenizer."""
        decode = self.tokenizer.decode_bytes
        return Closing(lambda token: decode([token]), self.vocab)

    def matcher(self, grammar: str) -> LLMatcher:
        """A matcher at the start of `grammar`, which is in llguidance's form, JSON or Lark.

        Raises RequestError for a grammar that is wrong, unsupported or too large.
        """
        with self._lock:
            kept = self._kept.get(grammar)
            if kept is not None:
                self._kept.move_to_end(grammar)
                return kept.deep_copy()
        made = LLMatcher(self.tokenizer, grammar, log_level=0)
        if made.is_error():
            raise RequestError(first_line(made.get_error()), param="grammar")
        with self._lock:
            if grammar not in self._kept:
                self._kept[grammar] = made
                self._kept_chars += len(grammar)
            while self._kept_chars > _MAX_KEPT_CHARS:
                text, _ = self._kept.popitem(last=False)
                self._kept_chars -= len(text)
        return made.deep_copy()


def first_line(message: str, most: int = 500) -> str:
    """The part of llguidance's error that is for people; its dumps of state follow."""
    return message.strip().split("\n", 1)[0][:most]
