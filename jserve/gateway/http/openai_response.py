"""Deltas of text → the JSON of OpenAI's completion and chat completion objects.

Shapes are OpenAI's, with vLLM's `stop_reason` and `prompt_logprobs`. Numbers and texts only: the
caller serializes.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import orjson

from jserve.core.request import TokenLogprobs
from jserve.gateway.http.long_list import LongList
from jserve.gateway.request_plane import OutputDelta

Json = dict[str, Any]

_LEAST_LOGPROB = -9999.0  # JSON has no -inf; the value is OpenAI's and vLLM's


class TokenText(Protocol):
    """Text of single tokens, for logprobs; a `TextTokenizer` is one."""

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that the token adds to the text."""
        ...

    def token_text(self, token_id: int) -> str:
        """The token's bytes as text."""
        ...


@dataclass(frozen=True, slots=True)
class TokenIds:
    """Tokens whose log-probabilities name them by their ids, as vLLM does it on demand."""

    tokens: TokenText

    def token_bytes(self, token_id: int) -> bytes:
        return self.tokens.token_bytes(token_id)

    def token_text(self, token_id: int) -> str:
        return self.tokens.token_text(token_id)


@dataclass(frozen=True, slots=True)
class Head:
    """Fields that every object of one answer repeats."""

    id: str
    created: int  # Unix time, seconds
    model: str
    fingerprint: str  # OpenAI's system_fingerprint: equal ones give equal answers to equal seeds

    def json(self, kind: str, choices: Sequence[Json | orjson.Fragment]) -> Json:
        """Makes an answer or a chunk; `kind` is OpenAI's `object`."""
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        }


def usage_json(
    prompt_tokens: int, completion_tokens: int, cached_tokens: int, reasoning_tokens: int = 0
) -> Json:
    """Makes `usage`; `cached_tokens` are those of the prompt that were not computed."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": reasoning_tokens},
    }


def finish_json(delta: OutputDelta) -> Json:
    """`finish_reason` and vLLM's `stop_reason` of a delta; null while its choice goes on."""
    finish = None if delta.finish is None else delta.finish.value
    return {"finish_reason": finish, "stop_reason": delta.stop_reason}


def spelled(token_id: int, tokens: TokenText) -> str:
    """The token as every logprobs object of OpenAI's API writes it.

    A token that is no text of its own, such as half a character, is written by its bytes, so that
    different ones are never spelled alike.
    """
    if isinstance(tokens, TokenIds):
        return f"token_id:{token_id}"
    raw = tokens.token_bytes(token_id)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return _by_bytes(raw)


def _by_bytes(raw: bytes) -> str:
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def chat_logprobs(entries: Iterable[TokenLogprobs], tokens: TokenText) -> Json:
    content = LongList()
    for entry in entries:
        content.append(_chat_position(entry, tokens), 1 + len(entry.top))
    return {"content": content.json(), "refusal": None}


def _chat_position(entry: TokenLogprobs, tokens: TokenText) -> Json:
    top = [_chat_token(token_id, logprob, tokens) for token_id, logprob in entry.top]
    return {**_chat_token(entry.token_id, entry.logprob, tokens), "top_logprobs": top}


def _chat_token(token_id: int, logprob: float, tokens: TokenText) -> Json:
    return {
        "token": spelled(token_id, tokens),
        "logprob": max(logprob, _LEAST_LOGPROB),
        "bytes": list(tokens.token_bytes(token_id)),
    }


class CompletionLogprobs:
    """Builds the `logprobs` of one completion choice, in one go or chunk by chunk.

    Each of `tokens` is a key of its `top_logprobs` and has its own log-probability there: clients
    look the token up to learn whether it was the best.
    `text_offset` counts the characters before each token, over the bytes of all tokens so far; a
    token that continues a character has that character's offset. Owned by one choice.
    """

    def __init__(self, tokens: TokenText, top: int) -> None:
        self._tokens = tokens
        self._top = top  # requested alternatives per position
        self._offset = 0  # characters begun so far

    def add(self, token_ids: Sequence[int], entries: Iterable[TokenLogprobs | None]) -> Json:
        """Makes the object for the next tokens; the entry of a prompt's first token is None."""
        texts: list[str] = []
        offsets: list[int] = []
        logprobs: list[float | None] = []
        alternatives = LongList()
        for token_id, entry in zip(token_ids, entries, strict=True):
            raw = self._tokens.token_bytes(token_id)
            texts.append(spelled(token_id, self._tokens))
            continues = raw[:1] != b"" and raw[0] & 0xC0 == 0x80
            offsets.append(max(self._offset - continues, 0))
            self._offset += sum(byte & 0xC0 != 0x80 for byte in raw)
            if entry is None:
                logprobs.append(None)
                alternatives.append(None)
            else:
                logprobs.append(max(entry.logprob, _LEAST_LOGPROB))
                alternatives.append(self._alternatives(entry), 1 + len(entry.top))
        return {
            "text_offset": offsets,
            "token_logprobs": logprobs,
            "tokens": texts,
            "top_logprobs": alternatives.json(),
        }

    def _alternatives(self, entry: TokenLogprobs) -> dict[str, float]:
        # Best first; of ids with the same text the best counts. The token itself is always there.
        own = spelled(entry.token_id, self._tokens)
        found: dict[str, float] = {}
        for token_id, logprob in entry.top[: self._top]:
            key = spelled(token_id, self._tokens)
            if key == own and token_id != entry.token_id:
                key = _by_bytes(self._tokens.token_bytes(token_id))
            found.setdefault(key, max(logprob, _LEAST_LOGPROB))
        found[own] = max(entry.logprob, _LEAST_LOGPROB)
        return found


def prompt_logprobs_json(
    entries: Iterable[TokenLogprobs | None], tokens: TokenText
) -> list[dict[str, Json] | None] | orjson.Fragment:
    """Maps token id → logprob, rank and text for each position, as in vLLM; the first is null."""
    positions = LongList()
    for entry in entries:
        if entry is None:
            positions.append(None)
        else:
            positions.append(_ranked(entry, tokens), 1 + len(entry.top))
    return positions.json()


def _ranked(entry: TokenLogprobs, tokens: TokenText) -> dict[str, Json]:
    ranked = [(entry.token_id, entry.logprob, entry.rank)]
    ranked += [(token_id, logprob, rank) for rank, (token_id, logprob) in enumerate(entry.top, 1)]
    return {
        str(token_id): {
            "logprob": max(logprob, _LEAST_LOGPROB),
            "rank": rank,
            "decoded_token": tokens.token_text(token_id),
        }
        for token_id, logprob, rank in reversed(ranked)  # the token's own rank wins
    }
