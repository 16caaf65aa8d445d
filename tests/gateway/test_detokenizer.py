"""Incremental text against the tokenizer library's own whole decode."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from jserve.core.errors import ConfigError
from jserve.gateway.tokenizer import TextTokenizer
from tests.gateway.tiny_tokenizers import END_OF_TURN, byte_level_json, sentencepiece_json

KINDS = {
    "byte_level": byte_level_json(),
    "llama2": sentencepiece_json(),
    "gemma": sentencepiece_json(strips=False),
}
TOKENIZERS = {kind: TextTokenizer(source) for kind, source in KINDS.items()}
ORACLES = {kind: Tokenizer.from_str(source) for kind, source in KINDS.items()}
TEXTS = st.text(
    st.one_of(st.characters(codec="utf-8"), st.sampled_from("  \n▁<0x41>👍🏽你好é")), max_size=30
)


def cut(ids: list[int], sizes: list[int]) -> list[list[int]]:
    """`ids` in pieces of the given sizes, repeated."""
    rest, pieces = iter(ids), []
    for size in itertools.cycle(sizes):
        piece = list(itertools.islice(rest, size))
        if not piece:
            return pieces
        pieces.append(piece)
    return pieces


SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@pytest.mark.parametrize("kind", KINDS)
@given(
    # Any ids at all: invalid UTF-8, special and added tokens, ids beyond the vocabulary.
    ids=st.lists(st.integers(0, 430), max_size=40),
    sizes=SIZES,
    skip=st.booleans(),
)
def test_stream_of_any_ids_equals_whole_decode(kind, ids, sizes, skip):
    tokenizer = TOKENIZERS[kind]
    detokenizer = tokenizer.detokenizer(skip_special_tokens=skip)
    streamed = "".join(detokenizer.push(piece) for piece in cut(ids, sizes)) + detokenizer.flush()
    oracle = ORACLES[kind].decode(ids, skip_special_tokens=skip)
    assert streamed == oracle


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS, sizes=SIZES)
def test_text_survives_the_round_trip_without_a_broken_character(kind, text, sizes):
    tokenizer = TOKENIZERS[kind]
    ids = ORACLES[kind].encode(text, add_special_tokens=False).ids
    detokenizer = tokenizer.detokenizer(skip_special_tokens=False)
    pieces = [detokenizer.push(piece) for piece in cut(ids, sizes)]
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)
    whole = "".join(pieces) + detokenizer.flush()
    # SentencePiece cannot tell a literal ▁ from a space.
    assert whole == (text if kind == "byte_level" else text.replace("▁", " "))


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS, where=st.integers(0, 60))
def test_output_continues_the_prompt(kind, text, where):
    tokenizer = TOKENIZERS[kind]
    ids = ORACLES[kind].encode(text, add_special_tokens=False).ids
    prompt, output = ids[:where], ids[where:]
    detokenizer = tokenizer.detokenizer(skip_special_tokens=False, prompt=prompt)
    continuation = detokenizer.push(output) + detokenizer.flush()
    whole = tokenizer.decode(ids, skip_special_tokens=False)
    # Complete characters that the prompt has are not said again, the unfinished one is.
    known = b"".join(map(tokenizer.token_bytes, prompt)).decode(errors="ignore")
    if kind == "llama2":  # whose whole text begins with a space that is not the user's
        known = known.removeprefix(" ")
    assert known + continuation == whole


def test_leading_space_is_kept_after_a_prompt_and_stripped_at_the_start():
    tokenizer = TextTokenizer(sentencepiece_json())
    prompt = tokenizer.encode("Once upon")
    output = tokenizer.encode("a time", add_special_tokens=False)
    alone = tokenizer.detokenizer()
    assert alone.push(output) == "a time"
    after = tokenizer.detokenizer(prompt=prompt)
    assert after.push(output) == " a time"


def test_half_a_character_is_held_back():
    tokenizer = TextTokenizer(byte_level_json())
    ids = tokenizer.encode("👍")
    assert len(ids) == 4
    detokenizer = tokenizer.detokenizer()
    assert [detokenizer.push([i]) for i in ids] == ["", "", "", "👍"]
    assert detokenizer.push(ids[:2]) == ""
    assert detokenizer.flush() == "\ufffd"


def test_token_bytes_join_to_the_text():
    for tokenizer in TOKENIZERS.values():
        ids = tokenizer.encode("Grüße 👍 你好 x", add_special_tokens=False)
        joined = b"".join(map(tokenizer.token_bytes, ids)).decode()
        assert joined.removeprefix(" ") == "Grüße 👍 你好 x"
    end = tokenizer.token_id(END_OF_TURN)
    assert end is not None
    assert tokenizer.token_text(end) == END_OF_TURN


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        {"type": "WordPiece", "prefix": "##", "cleanup": True},
        {"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "ByteFallback"}]},
        {"type": "Replace", "pattern": {"Regex": "x"}, "content": ""},
        {
            "type": "Sequence",
            "decoders": [{"type": "Strip", "content": " ", "start": 1, "stop": 0}],
        },
    ],
)
def test_unknown_decoder_is_a_config_error(decoder):
    raw = json.loads(byte_level_json()) | {"decoder": decoder}
    with pytest.raises(ConfigError, match="decoder"):
        TextTokenizer(json.dumps(raw))
