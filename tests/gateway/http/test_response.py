"""Response builders against independent readings of the same bytes."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat.chat_completion import ChoiceLogprobs

from jserve.core.request import TokenLogprobs
from jserve.gateway.http.openai_response import (
    CompletionLogprobs,
    chat_logprobs,
    prompt_logprobs_json,
)


class Bytes:
    """Tokens are given byte strings."""

    def __init__(self, tokens: list[bytes]) -> None:
        self._tokens = tokens

    def token_bytes(self, token_id: int) -> bytes:
        return self._tokens[token_id]

    def token_text(self, token_id: int) -> str:
        return self._tokens[token_id].decode(errors="replace")


def entry(token_id: int, *top: tuple[int, float]) -> TokenLogprobs:
    return TokenLogprobs(token_id, -1.0, 1, top)


@given(
    text=st.text(max_size=20),
    cuts=st.lists(st.integers(1, 3), min_size=1),
    split=st.integers(0, 30),
)
def test_text_offsets_count_whole_characters(text: str, cuts: list[int], split: int) -> None:
    raw, tokens, at = text.encode(), [], 0
    while at < len(raw):
        size = cuts[len(tokens) % len(cuts)]
        tokens.append(raw[at : at + size])
        at += size
    starts = [len(b"".join(tokens[:i])) for i in range(len(tokens))]
    expected = [len(raw[:start].decode(errors="ignore")) for start in starts]
    builder = CompletionLogprobs(Bytes(tokens), top=0)
    ids = range(len(tokens))
    offsets: list[int] = []
    for part in (ids[:split], ids[split:]):  # streamed in two chunks
        offsets += builder.add(part, [entry(i) for i in part])["text_offset"]
    assert offsets == expected


def test_top_logprobs_hold_the_token_itself_and_keep_the_best_of_equal_texts() -> None:
    tokens = Bytes([b"a", b"b", b"b", b"\xf0", b"\x9f"])
    built = CompletionLogprobs(tokens, top=2).add(
        [0, 3], [entry(0, (1, -0.1), (2, -0.2)), entry(3, (3, -1.0), (4, -1.4))]
    )
    assert built["top_logprobs"] == [
        {"b": -0.1, "a": -1.0},
        {"bytes:\\xf0": -1.0, "bytes:\\x9f": -1.4},
    ]
    fewer = CompletionLogprobs(tokens, top=0).add([0], [entry(0, (1, -0.1))])
    assert fewer["top_logprobs"] == [{"a": -1.0}]


TOKENS = st.lists(st.binary(max_size=4), min_size=2, max_size=8)


@given(tokens=TOKENS, data=st.data())
def test_a_token_is_the_key_of_its_own_logprob(tokens: list[bytes], data: st.DataObject) -> None:
    """Whatever bytes tokens have and however many are alike: what evaluation harnesses read."""
    chosen = data.draw(st.integers(0, len(tokens) - 1))
    ranked = data.draw(st.permutations(range(len(tokens))))
    rank = ranked.index(chosen) + 1
    top = tuple((token_id, -float(place)) for place, token_id in enumerate(ranked[:5], 1))
    position = TokenLogprobs(chosen, -float(rank), rank, top)
    built = CompletionLogprobs(Bytes(tokens), top=5).add([chosen], [position])
    (token,), (best,), (logprob,) = (
        built[name] for name in ("tokens", "top_logprobs", "token_logprobs")
    )
    assert best[token] == logprob == -rank
    if tokens.count(tokens[chosen]) == 1 or not token.startswith("bytes:"):
        greedy = max(best, key=lambda key: best[key]) == token  # as lm-eval has it
        assert greedy == (rank == 1)
    content = chat_logprobs([position], Bytes(tokens))["content"][0]
    assert content["token"] == token
    assert [it["token"] for it in content["top_logprobs"] if it["logprob"] == -rank] == [token] * (
        rank <= 5
    )


def test_different_parts_of_a_character_read_differently() -> None:
    halves = Bytes([b"\xf0\x9f", b"\xa6", b"\xa9", "\ufffd".encode()])
    built = CompletionLogprobs(halves, top=0).add(range(4), [entry(i) for i in range(4)])
    assert built["tokens"] == ["bytes:\\xf0\\x9f", "bytes:\\xa6", "bytes:\\xa9", "\ufffd"]
    chat = chat_logprobs([entry(i) for i in range(4)], halves)
    assert [it["token"] for it in chat["content"]] == built["tokens"]


def test_impossible_tokens_stay_json() -> None:
    tokens = Bytes([b"a", b"b"])
    impossible = TokenLogprobs(0, -math.inf, 2, ((1, -math.inf),))
    chat = chat_logprobs([impossible], tokens)
    assert chat["content"][0]["logprob"] == -9999.0
    ChoiceLogprobs.model_validate(chat, strict=True)
    completion = CompletionLogprobs(tokens, 1).add([0], [impossible])
    assert completion["token_logprobs"] == [-9999.0]
    assert prompt_logprobs_json([None, impossible], tokens)[1] == {
        "1": {"logprob": -9999.0, "rank": 1, "decoded_token": "b"},
        "0": {"logprob": -9999.0, "rank": 2, "decoded_token": "a"},
    }


@pytest.mark.parametrize("streamed", [True, False])
def test_chat_bytes_rebuild_the_text(streamed: bool) -> None:
    tokens = Bytes([bytes([byte]) for byte in range(256)])
    raw = "añ🙂".encode()
    parts = [[byte] for byte in raw] if streamed else [list(raw)]
    content = [it for part in parts for it in chat_logprobs(map(entry, part), tokens)["content"]]
    assert bytes(byte for it in content for byte in it["bytes"]) == raw
