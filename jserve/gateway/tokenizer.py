"""Converts text to token ids and back by the model's own tokenizer."""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial

from tokenizers import Tokenizer

from jserve.core.errors import ConfigError
from jserve.gateway.detokenizer import (
    ByteFallbackDetokenizer,
    ByteLevelDetokenizer,
    DecoderSpec,
    Detokenizer,
    Fragments,
)

_LONG_TEXT_CHARS = 4096  # about a millisecond of encoding; longer texts go to a thread
_MAX_LONG_TEXTS = 2  # texts encoded at a time


class TextTokenizer:
    """Wraps a `tokenizers.Tokenizer`. Safe to use from several threads.

    `add_bos` is the model's habit: True and False are obeyed whatever the post-processor of
    tokenizer.json does, None leaves it to the post-processor.
    """

    def __init__(
        self,
        tokenizer_json: str,
        *,
        bos_token_id: int | None = None,
        add_bos: bool | None = None,
    ) -> None:
        try:
            self._tokenizer = Tokenizer.from_str(tokenizer_json)
        except Exception as error:  # the library raises no subclass
            raise ConfigError(f"tokenizer.json: {error}") from error
        # A file may carry the truncation or padding of its training run.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # The pool is small because a long text takes a gigabyte while it is encoded.
        self._threads = ThreadPoolExecutor(_MAX_LONG_TEXTS, thread_name_prefix="tokenizer")
        added = self._tokenizer.get_added_tokens_decoder()
        self.vocab = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.bos_token_id = bos_token_id
        blank: list[int] = self._tokenizer.encode("", add_special_tokens=True).ids
        self._processor_adds_bos = bos_token_id is not None and blank[:1] == [bos_token_id]
        self._add_bos = self._processor_adds_bos if add_bos is None else add_bos
        self._fragments = Fragments(
            self._tokenizer,
            DecoderSpec.from_tokenizer(self._tokenizer),
            frozenset(token_id for token_id, token in added.items() if token.special),
            frozenset(added),
        )

    def encode(self, text: str, *, add_special_tokens: bool | None = None) -> list[int]:
        """Returns token ids. Special tokens in the text are parsed as such, as in Hugging Face.

        `add_special_tokens` True and None mean the model's habit. A BOS is never doubled: a text
        that spells it out gets no second one.
        """
        if add_special_tokens is False:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=True).ids
        bos = self.bos_token_id
        if bos is None:
            return ids
        if self._processor_adds_bos and (not self._add_bos or ids[1:2] == [bos]):
            return ids[1:]
        if self._add_bos and ids[:1] != [bos]:
            return [bos, *ids]
        return ids

    def least_tokens(self, text: str) -> int:
        """A lower bound of the number of tokens, at a fraction of the cost of `encode`.

        Megabytes of text that cannot fit are refused by it before they become gigabytes of
        tokens. It is 0 where there is no bound.
        """
        if self._longest_token == 0:
            return 0
        if self._tokenizer.normalizer is not None:
            text = self._tokenizer.normalizer.normalize_str(text)
        size = len(text.encode()) if self._fragments.spec.byte_level else len(text)
        return -(-size // self._longest_token)

    @cached_property
    def _longest_token(self) -> int:
        """The most bytes (byte level) or characters that one token covers; 0 if unbounded."""
        spec, added = self._fragments.spec, self._tokenizer.get_added_tokens_decoder().values()
        if not (spec.byte_level or spec.byte_fallback) or any(t.lstrip or t.rstrip for t in added):
            return 0  # an unknown token or one that swallows white space has any length
        tokens = self._tokenizer.get_vocab(with_added_tokens=False)
        return max(*(len(t.content.encode()) for t in added), *map(len, tokens), 1)

    async def encode_async(self, text: str, *, add_special_tokens: bool | None = None) -> list[int]:
        """Runs `encode` off the event loop when the text is long."""
        if len(text) <= _LONG_TEXT_CHARS:
            return self.encode(text, add_special_tokens=add_special_tokens)
        encode = partial(self.encode, text, add_special_tokens=add_special_tokens)
        return await asyncio.get_running_loop().run_in_executor(self._threads, encode)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Returns the text of a whole sequence, which a stream of it gives in pieces."""
        detokenizer = self.detokenizer(skip_special_tokens=skip_special_tokens)
        return detokenizer.push(ids) + detokenizer.flush()

    def detokenizer(
        self, *, skip_special_tokens: bool = True, prompt: Sequence[int] = ()
    ) -> Detokenizer:
        """Starts an incremental decode.

        Without `prompt` its text equals `decode` of the pushed ids. With it, it is the
        continuation of the prompt's text: a leading space stays, and a character that the prompt
        left unfinished is completed.
        """
        kind = ByteLevelDetokenizer if self._fragments.spec.byte_level else ByteFallbackDetokenizer
        return kind(
            self._fragments, skip_special_tokens=skip_special_tokens, prompt=tuple(prompt[-16:])
        )

    def token_id(self, token: str) -> int | None:
        """The id of a token by its exact name, for example `<|im_end|>`."""
        return self._tokenizer.token_to_id(token)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to the text, a special token's name included."""
        return self._fragments.raw(token_id)

    def token_text(self, token_id: int) -> str:
        """`token_bytes` as text, undecodable bytes replaced."""
        return self._fragments.raw(token_id).decode(errors="replace")
