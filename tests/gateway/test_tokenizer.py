"""Encoding: special tokens, the BOS, long texts off the loop."""

import asyncio
import json
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from jserve.core.errors import ConfigError
from jserve.gateway.tokenizer import TextTokenizer
from tests.gateway.tiny_tokenizers import BOS, END_OF_TURN, byte_level_json, sentencepiece_json

BOS_ID = 1  # id in the SentencePiece tokenizer
TOKENIZERS = [
    TextTokenizer(source)
    for source in (byte_level_json(), sentencepiece_json(), sentencepiece_json(strips=False))
]


def spm(*, adds_bos=True, add_bos=None) -> TextTokenizer:
    return TextTokenizer(
        sentencepiece_json(adds_bos=adds_bos), bos_token_id=BOS_ID, add_bos=add_bos
    )


@pytest.mark.parametrize(
    ("adds_bos", "add_bos", "expected"),
    [(True, None, True), (True, False, False), (False, None, False), (False, True, True)],
)
def test_the_models_habit_decides_about_the_bos(adds_bos, add_bos, expected):
    tokenizer = spm(adds_bos=adds_bos, add_bos=add_bos)
    body = Tokenizer.from_str(sentencepiece_json()).encode("Hello", add_special_tokens=False).ids
    assert tokenizer.encode("Hello") == [BOS_ID] * expected + body
    assert tokenizer.encode("Hello", add_special_tokens=False) == body


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("add_bos", [None, True, False])
def test_a_bos_is_never_doubled(adds_bos, add_bos):
    tokenizer = spm(adds_bos=adds_bos, add_bos=add_bos)
    ids = tokenizer.encode(f"{BOS}Hello")
    assert ids[0] == BOS_ID
    assert ids.count(BOS_ID) == 1
    # The user's text is left alone.
    assert tokenizer.encode(f"{BOS}{BOS}Hello").count(BOS_ID) == 2
    assert tokenizer.encode(f"{BOS}Hello", add_special_tokens=False).count(BOS_ID) == 1


def test_special_tokens_in_text_are_parsed_as_hugging_face_does():
    tokenizer = TextTokenizer(byte_level_json())
    end = tokenizer.token_id(END_OF_TURN)
    assert tokenizer.encode(f"a{END_OF_TURN}b")[1] == end
    assert tokenizer.decode(tokenizer.encode(f"a{END_OF_TURN}b")) == "ab"
    kept = tokenizer.decode(tokenizer.encode(f"a{END_OF_TURN}b"), skip_special_tokens=False)
    assert kept == f"a{END_OF_TURN}b"


def test_truncation_and_padding_of_the_file_are_ignored():
    raw = json.loads(byte_level_json())
    raw["truncation"] = {
        "direction": "Right",
        "max_length": 3,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    raw["padding"] = {
        "strategy": {"Fixed": 64},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": BOS,
    }
    text = "The quick brown fox jumps over the lazy dog."
    plain = TextTokenizer(byte_level_json()).encode(text)
    assert TextTokenizer(json.dumps(raw)).encode(text) == plain


def test_long_text_is_encoded_in_another_thread():
    tokenizer = TextTokenizer(byte_level_json())
    encode, threads = tokenizer.encode, []

    def spy(text, **options):
        threads.append(threading.current_thread())
        return encode(text, **options)

    tokenizer.encode = spy
    text = "Hello, world! " * 1000

    async def main():
        assert await tokenizer.encode_all([text]) == [encode(text)]
        assert await tokenizer.encode_all(["short"]) == [encode("short")]

    asyncio.run(main())
    assert threads[0] is not threading.main_thread()
    assert threads[1] is threading.main_thread()


@given(text=st.text(st.characters(codec="utf-8") | st.sampled_from("the  <s>"), max_size=200))
def test_least_tokens_is_a_lower_bound(text):
    for tokenizer in TOKENIZERS:
        assert tokenizer.least_tokens(text) <= len(tokenizer.encode(text))
        assert tokenizer.least_tokens("x" * 10_000) > 500


def test_a_broken_file_is_a_config_error():
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        TextTokenizer("{}")
