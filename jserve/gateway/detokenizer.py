"""Detokenizes incrementally: never half a character, and in sum what a whole decode gives.

Two kinds of tokenizer exist in practice. Byte-level BPE maps every token to bytes; the bytes of
all tokens together are UTF-8. SentencePiece maps tokens to text and falls back to byte tokens
`<0x41>`; a run of those is text if the *whole* run is UTF-8, else one U+FFFD per byte. So a run
is held back until it ends, which costs one token of delay after a rare character.
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
_TAIL_TOKENS = 16  # end of a prompt searched for an unfinished character; 3 bytes are enough
_utf8_decoder = codecs.getincrementaldecoder("utf-8")


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
            try:
                return bytes(self._bytes[char] for char in token)
            except KeyError:  # an added token is text already
                return token.encode()
        for pattern, content in self.spec.replaces:
            token = token.replace(pattern, content)
        if self.spec.byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return int(match[1], 16)
        return token


class ByteLevelDetokenizer:
    """A `Detokenizer` for byte-level BPE; the output completes a character that `prompt` began."""

    def __init__(
        self, fragments: Fragments, *, skip_special_tokens: bool, prompt: tuple[int, ...] = ()
    ) -> None:
        self._fragments = fragments
        self._skipped = fragments.special if skip_special_tokens else frozenset[int]()
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
        self, fragments: Fragments, *, skip_special_tokens: bool, prompt: tuple[int, ...] = ()
    ) -> None:
        self._fragments = fragments
        self._skipped = fragments.special if skip_special_tokens else frozenset[int]()
        self._run = bytearray()
        self._strip = "" if prompt else fragments.spec.strip_start
        self._prime(prompt[-_TAIL_TOKENS:])

    def push(self, ids: Iterable[int]) -> str:
        of, skipped, run = self._fragments.of, self._skipped, self._run
        parts: list[str] = []
        for token_id in ids:
            if token_id in skipped:
                continue
            fragment = of(token_id)
            if isinstance(fragment, int):
                run.append(fragment)
                continue
            if isinstance(fragment, bytes):
                continue
            if run:
                parts.append(self._close_run())
            parts.append(fragment)
        return self._stripped("".join(parts))

    def flush(self) -> str:
        return self._stripped(self._close_run())

    def _close_run(self) -> str:
        run = bytes(self._run)
        self._run.clear()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return _REPLACEMENT * len(run)

    def _stripped(self, text: str) -> str:
        while self._strip and text:
            if text[0] != self._strip[0]:
                self._strip = ""
            else:
                text, self._strip = text[1:], self._strip[1:]
        return text

    def _prime(self, tail: tuple[int, ...]) -> None:
        """Takes over the bytes of an unfinished character at the end of the prompt."""
        self.push(tail)
        decoder = _utf8_decoder(errors="replace")
        decoder.decode(bytes(self._run))
        self._run[:] = decoder.getstate()[0]
