"""Detokenizes incrementally: never half a character, and every character once it is complete.

Two kinds of tokenizer exist in practice. Byte-level BPE maps every token to bytes; the bytes of
all tokens together are UTF-8. SentencePiece maps tokens to text and falls back to byte tokens
`<0x41>`, whose neighbours join to characters. A byte that belongs to no character becomes one
U+FFFD, as in SentencePiece itself. `tokenizers` replaces every byte of a run as soon as one is
wrong; its answer is not known before the run ends, so no character of it could be streamed.
"""

import codecs
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from tokenizers import Tokenizer

from jserve.core.errors import ConfigError

# Bytes (byte level), text, or one fallback byte; an id that the tokenizer does not know is b"".
Fragment = bytes | str | int

# Byte-level BPE; SentencePiece. A strip before the fuse would act on every token.
_SUPPORTED = re.compile(r"ByteLevel( Fuse)?|(Replace ?)*(ByteFallback ?)?(Fuse( Strip)?)?")
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_PER_BYTE = "jserve.replace_each_byte"  # name of an error handler of `codecs`
_TAIL_TOKENS = 16  # end of a prompt searched for an unfinished character; 3 bytes are enough
_utf8_decoder = codecs.getincrementaldecoder("utf-8")


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return _REPLACEMENT * (error.end - error.start), error.end


codecs.register_error(_PER_BYTE, _replace_each_byte)


class Detokenizer(Protocol):
    """The text of one sequence. `push` any number of tokens, `flush` once at the end."""

    def push(self, ids: Iterable[int]) -> str:
        """Returns the text that these tokens complete."""
        ...

    def flush(self) -> str:
        """Returns the withheld text, incomplete characters replaced."""
        ...


@dataclass(frozen=True, slots=True)
class DecoderSpec:
    """Rules of the `decoder` in a tokenizer.json, as far as they are supported."""

    byte_level: bool = False
    replaces: tuple[tuple[str, str], ...] = ()  # (from, to) applied to each token in order
    byte_fallback: bool = False
    strip_start: str = ""  # stripped from the start of the whole text

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer) -> "DecoderSpec":
        """Reads the decoder; one it does not know is a ConfigError."""
        # The pickled state is the decoder's JSON; the JSON of the whole tokenizer takes a second.
        state: bytes = b'{"type": "none"}'
        if tokenizer.decoder is not None:
            state = tokenizer.decoder.__getstate__()
        decoder: dict[str, Any] = json.loads(state)
        steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
        kinds = " ".join(step["type"] for step in steps)
        patterns = [(s["pattern"].get("String"), s["content"]) for s in steps if "pattern" in s]
        strips = [step for step in steps if step["type"] == "Strip"]
        if not _SUPPORTED.fullmatch(kinds) or any(s["stop"] for s in strips):
            raise ConfigError(f"tokenizer.json: decoder {json.dumps(decoder)} is not supported")
        if any(pattern is None for pattern, _ in patterns):
            raise ConfigError("tokenizer.json: a decoder that replaces by regex is not supported")
        return cls(
            byte_level="ByteLevel" in kinds,
            replaces=tuple(patterns),
            byte_fallback="ByteFallback" in kinds,
            strip_start="".join(step["content"] * step["start"] for step in strips),
        )


def _byte_of_char() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in set(printable))
    table.update({chr(256 + i): byte for i, byte in enumerate(others)})
    return table


@dataclass(slots=True)
class Fragments:
    """Text that each token id adds, computed when first seen. Shared by all sequences."""

    tokenizer: Tokenizer
    spec: DecoderSpec
    special: frozenset[int]
    added: frozenset[int] = frozenset()  # added tokens, whose text no byte table applies to
    _known: dict[int, Fragment] = field(default_factory=dict[int, Fragment])
    _bytes: dict[str, int] = field(default_factory=_byte_of_char)

    def of(self, token_id: int) -> Fragment:
        fragment = self._known.get(token_id)
        if fragment is None:
            fragment = self._known[token_id] = self._compute(token_id)
        return fragment

    def raw(self, token_id: int) -> bytes:
        """The bytes of a token's text."""
        fragment = self.of(token_id)
        if isinstance(fragment, int):
            return bytes((fragment,))
        return fragment.encode() if isinstance(fragment, str) else fragment

    def _compute(self, token_id: int) -> Fragment:
        token = self.tokenizer.id_to_token(token_id)
        if token is None:
            return b""
        if self.spec.byte_level:
            if token_id in self.added:
                return token.encode()
            try:
                return bytes(self._bytes[char] for char in token)
            except KeyError:  # a word that no text yields; `tokenizers` takes it as it is
                return token.encode()
        for pattern, content in self.spec.replaces:
            token = token.replace(pattern, content)
        if self.spec.byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return int(match[1], 16)
        return token


class ByteLevelDetokenizer:
    """A `Detokenizer` for byte-level BPE; the output completes a character that `prompt` began."""

    def __init__(
        self,
        fragments: Fragments,
        *,
        skip_special_tokens: bool,
        shown_tokens: frozenset[int] = frozenset(),
        prompt: tuple[int, ...] = (),
    ) -> None:
        self._fragments = fragments
        self._skipped = (
            fragments.special - shown_tokens if skip_special_tokens else frozenset[int]()
        )
        self._decoder = _utf8_decoder(errors="replace")
        self.push(prompt[-_TAIL_TOKENS:])

    def push(self, ids: Iterable[int]) -> str:
        of, skipped = self._fragments.of, self._skipped
        return self._decoder.decode(b"".join([of(i) for i in ids if i not in skipped]))  # pyright: ignore

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class ByteFallbackDetokenizer:
    """A `Detokenizer` for SentencePiece; without a prompt the leading space is stripped."""

    def __init__(
        self,
        fragments: Fragments,
        *,
        skip_special_tokens: bool,
        shown_tokens: frozenset[int] = frozenset(),
        prompt: tuple[int, ...] = (),
    ) -> None:
        self._fragments = fragments
        self._skipped = (
            fragments.special - shown_tokens if skip_special_tokens else frozenset[int]()
        )
        self._decoder = _utf8_decoder(errors=_PER_BYTE)
        self._in_run = False  # the last fragment was a byte
        self._strip = "" if prompt else fragments.spec.strip_start
        self.push(prompt[-_TAIL_TOKENS:])  # the decoder keeps the prompt's unfinished character

    def push(self, ids: Iterable[int]) -> str:
        of, skipped, decode = self._fragments.of, self._skipped, self._decoder.decode
        parts: list[str] = []
        for token_id in ids:
            if token_id in skipped:
                continue
            fragment = of(token_id)
            if isinstance(fragment, int):
                self._in_run = True
                parts.append(decode(bytes((fragment,))))
            elif isinstance(fragment, str):
                if self._in_run:
                    parts.append(self._end_run())
                parts.append(fragment)
        return self._stripped("".join(parts))

    def flush(self) -> str:
        return self._stripped(self._end_run())

    def _end_run(self) -> str:
        """Replaces the bytes of a character that no byte continues any more."""
        self._in_run = False
        return self._decoder.decode(b"", final=True)

    def _stripped(self, text: str) -> str:
        while self._strip and text:
            if text[0] != self._strip[0]:
                self._strip = ""
            else:
                text, self._strip = text[1:], self._strip[1:]
        return text
