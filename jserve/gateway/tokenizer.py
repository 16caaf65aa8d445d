"""Converts text to token ids and back by the model's own tokenizer."""

import asyncio
import contextlib
import os
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, cached_property, partial
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import BPE

from jserve.core.errors import ConfigError
from jserve.gateway.detokenizer import (
    ByteFallbackDetokenizer,
    ByteLevelDetokenizer,
    DecoderSpec,
    Detokenizer,
    Fragments,
)

_SHORT_CHARS = 1024  # at most a millisecond or two of encoding; more goes to a thread
_LONG_CHARS = 64 << 10  # texts that take seconds; they wait for each other, not others for them
_PIECE_CHARS = 16 << 10  # of a text that is normalized; the library holds the GIL meanwhile
_SEAM_CHARS = 64  # by which normalizing a text in pieces may lengthen each of them
# Few threads, because a long text takes a gigabyte while it is encoded.
_NUM_THREADS = 2
_NUM_LONG_THREADS = 1
_POOL_NICENESS = 5


class TooManyTokens(Exception):
    """A text has more tokens than the caller can use."""

    def __init__(self, num_tokens: int) -> None:
        super().__init__(f"{num_tokens} tokens")
        self.num_tokens = num_tokens


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
        self.tokenizer_json = tokenizer_json  # for what makes its own of it, in other processes
        # A file may carry the truncation or padding of its training run.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._threads = ThreadPoolExecutor(_NUM_THREADS, "tokenizer")
        self._long_threads = ThreadPoolExecutor(_NUM_LONG_THREADS, "long-texts")
        _start_pool()
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
        _ = (
            self._longest_token
        )  # the whole vocabulary, which takes 50 ms, before there are requests

    def encode(
        self, text: str, *, add_special_tokens: bool | None = None, most: int | None = None
    ) -> list[int]:
        """Returns token ids. Special tokens in the text are parsed as such, as in Hugging Face.

        `add_special_tokens` True and None mean the model's habit. A BOS is never doubled: a text
        that spells it out gets no second one. Other threads run while a long text is encoded.

        Raises:
            TooManyTokens: there are more than `most`; they are not made into Python's numbers.
        """
        special = add_special_tokens is not False
        if len(text) <= _SHORT_CHARS:
            encoding = self._tokenizer.encode(text, add_special_tokens=special)
        else:
            # The batch call releases the GIL; `fast` leaves out what nobody reads.
            (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=special)
        if most is not None and len(encoding) > most + 1:  # a BOS may be taken off
            raise TooManyTokens(len(encoding))
        ids = self._with_bos(encoding.ids) if special else encoding.ids
        if most is not None and len(ids) > most:
            raise TooManyTokens(len(ids))
        return ids

    def _with_bos(self, ids: list[int]) -> list[int]:
        """Obeys the model's habit of a BOS where the post-processor does not."""
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
        normalizer, byte_level = self._tokenizer.normalizer, self._fragments.spec.byte_level
        if normalizer is None:
            size = len(text.encode()) if byte_level else len(text)
        else:
            size = 0
            for start in range(0, len(text), _PIECE_CHARS):
                piece = normalizer.normalize_str(text[start : start + _PIECE_CHARS])
                size += max(len(piece.encode() if byte_level else piece) - _SEAM_CHARS, 0)
                time.sleep(0)  # lets another thread have the GIL
        return -(-size // self._longest_token)

    @cached_property
    def _longest_token(self) -> int:
        """The most bytes (byte level) or characters that one token covers; 0 if unbounded."""
        spec, added = self._fragments.spec, self._tokenizer.get_added_tokens_decoder().values()
        if not (spec.byte_level or spec.byte_fallback) or any(t.lstrip or t.rstrip for t in added):
            return 0  # an unknown token or one that swallows white space has any length
        tokens = self._tokenizer.get_vocab(with_added_tokens=False)
        return max(*(len(t.content.encode()) for t in added), *map(len, tokens), 1)

    async def encode_all(
        self,
        texts: Sequence[str],
        *,
        add_special_tokens: bool | None = None,
        most: int | None = None,
    ) -> list[list[int]]:
        """Runs `encode` for each text, off the event loop unless all are short together."""
        sizes = [len(text) for text in texts]
        encode = partial(self._encode_each, texts, add_special_tokens, most)
        if sum(sizes) <= _SHORT_CHARS:
            return encode()
        threads = self._threads if max(sizes) <= _LONG_CHARS else self._long_threads
        return await asyncio.get_running_loop().run_in_executor(threads, encode)

    def _encode_each(
        self, texts: Sequence[str], special: bool | None, most: int | None
    ) -> list[list[int]]:
        return [self.encode(text, add_special_tokens=special, most=most) for text in texts]

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Returns the text of a whole sequence, which a stream of it gives in pieces."""
        detokenizer = self.detokenizer(skip_special_tokens=skip_special_tokens)
        return detokenizer.push(ids) + detokenizer.flush()

    async def decode_async(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Runs `decode` off the event loop."""
        decode = partial(self.decode, ids, skip_special_tokens=skip_special_tokens)
        return await asyncio.get_running_loop().run_in_executor(self._threads, decode)

    def detokenizer(
        self,
        *,
        skip_special_tokens: bool = True,
        shown_tokens: frozenset[int] = frozenset(),
        prompt: Sequence[int] = (),
    ) -> Detokenizer:
        """Starts an incremental decode; of the special tokens, `shown_tokens` are not skipped.

        Without `prompt` its text equals `decode` of the pushed ids. With it, it is the
        continuation of the prompt's text: a leading space stays, and a character that the prompt
        left unfinished is completed.
        """
        kind = ByteLevelDetokenizer if self._fragments.spec.byte_level else ByteFallbackDetokenizer
        return kind(
            self._fragments,
            skip_special_tokens=skip_special_tokens,
            shown_tokens=shown_tokens,
            prompt=tuple(prompt[-16:]),
        )

    def token_id(self, token: str) -> int | None:
        """The id of a token by its exact name, for example `<|im_end|>`."""
        return self._tokenizer.token_to_id(token)

    def token_name(self, token_id: int) -> str:
        """The token as the vocabulary spells it, for example `Ġis`; empty for an unknown id."""
        return self._tokenizer.id_to_token(token_id) or ""

    def added_tokens(self) -> dict[str, dict[str, Any]]:
        """Added tokens by id, with the settings of Hugging Face's `added_tokens_decoder`."""
        return {
            str(token_id): {
                "content": token.content,
                "lstrip": token.lstrip,
                "normalized": token.normalized,
                "rstrip": token.rstrip,
                "single_word": token.single_word,
                "special": token.special,
            }
            for token_id, token in self._tokenizer.get_added_tokens_decoder().items()
        }

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token adds to the text, a special token's name included."""
        return self._fragments.raw(token_id)

    def token_text(self, token_id: int) -> str:
        """`token_bytes` as text, undecodable bytes replaced."""
        return self._fragments.raw(token_id).decode(errors="replace")


@cache
def _start_pool() -> None:
    """Starts the library's own threads, which encode, at a lower priority than all others.

    They take every core for long texts, and an engine on the same CPU would fall behind. The first
    batch starts them, and they inherit the priority of its thread; that one ends here, since no
    thread that takes the GIL may be slow to give it back.
    """

    def start() -> None:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _POOL_NICENESS)
        Tokenizer(BPE()).encode_batch([""])

    if sys.platform == "linux":  # elsewhere a priority is that of a whole process
        starter = threading.Thread(target=start, name="tokenizer-pool")
        starter.start()
        starter.join()
