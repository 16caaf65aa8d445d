"""Incremental text against the tokenizer library's own whole decode.

The two differ where a run of byte tokens has a wrong byte, because the library replaces all of the
run: there the reference is SentencePiece's rule, one U+FFFD for each wrong byte.
"""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer

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


def by_characters(oracle: Tokenizer, ids: list[int]) -> str:
    """The library's decode, by one token, one character of bytes or one wrong byte."""
    ids = [i for i in ids if oracle.id_to_token(i) is not None]
    names = [oracle.id_to_token(i) for i in ids]
    text, at = "", 0
    while at < len(ids):
        sizes = [n for n in range(1, 5) if is_character(names[at : at + n])]
        size = sizes[0] if sizes else 1
        text += oracle.decode(ids[at : at + size], skip_special_tokens=False)
        at += size
    return text


def is_character(names: list[str]) -> bool:
    """Whether byte tokens of these names are the UTF-8 of one character."""
    if not all(name.startswith("<0x") for name in names):
        return False
    try:
        return len(bytes(int(name[3:5], 16) for name in names).decode()) == 1
    except UnicodeDecodeError:
        return False


# Any ids at all: invalid UTF-8, special and added tokens, ids beyond the vocabulary; often bytes.
ANY_IDS = st.lists(
    st.one_of(st.integers(0, 430), st.sampled_from([4 + byte for byte in "é👍\n".encode()])),
    max_size=40,
)


@given(ids=ANY_IDS, sizes=SIZES, skip=st.booleans())
def test_stream_of_any_ids_equals_whole_decode_of_byte_level(ids, sizes, skip):
    streamed = stream(TOKENIZERS["byte_level"], cut(ids, sizes), skip)
    assert streamed == ORACLES["byte_level"].decode(ids, skip_special_tokens=skip)
    assert streamed == TOKENIZERS["byte_level"].decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("kind", ["llama2", "gemma"])
@given(ids=ANY_IDS, sizes=SIZES, skip=st.booleans())
def test_stream_of_any_ids_keeps_every_character_of_sentencepiece(kind, ids, sizes, skip):
    streamed = stream(TOKENIZERS[kind], cut(ids, sizes), skip)
    assert streamed == TOKENIZERS[kind].decode(ids, skip_special_tokens=skip)
    shown = [i for i in ids if not (skip and i in (0, 1, 2, 3))]
    expected = by_characters(ORACLES["gemma"], shown)
    assert streamed == (expected.removeprefix(" ") if kind == "llama2" else expected)
    whole = ORACLES[kind].decode(ids, skip_special_tokens=skip)
    if "\ufffd" not in whole:
        assert streamed == whole


def stream(tokenizer: TextTokenizer, pieces: list[list[int]], skip: bool) -> str:
    detokenizer = tokenizer.detokenizer(skip_special_tokens=skip)
    return "".join(map(detokenizer.push, pieces)) + detokenizer.flush()


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


def byte_ids(data: bytes) -> list[int]:
    return [ORACLES["llama2"].token_to_id(f"<0x{byte:02X}>") for byte in data]


@pytest.mark.parametrize("kind", ["llama2", "gemma"])
def test_characters_of_byte_tokens_come_when_they_are_complete(kind):
    detokenizer = TOKENIZERS[kind].detokenizer()
    pieces = [detokenizer.push([i]) for i in byte_ids("\né👍\n".encode())]
    assert pieces == ["\n", "", "é", "", "", "", "👍", "\n"]
    assert detokenizer.flush() == ""


@pytest.mark.parametrize(
    ("run", "text"),
    [
        (b"\xc3\xa9\xc3\xa9\xc3", "éé\ufffd"),  # cut within the third character
        (b"\n\xf0\x9f\x91", "\n\ufffd\ufffd\ufffd"),
        (b"\xff\xc3\xa9\x80a", "\ufffdé\ufffda"),
        (b"\xe2\x82a", "\ufffd\ufffda"),
        (b"\xed\xa0\x80", "\ufffd\ufffd\ufffd"),  # a surrogate is no character
    ],
)
def test_a_wrong_byte_is_replaced_and_its_neighbours_stay(run, text):
    tokenizer = TOKENIZERS["llama2"]
    assert tokenizer.decode(byte_ids(run)) == text
    assert stream(tokenizer, [[i] for i in byte_ids(run)], skip=True) == text
    word = ORACLES["llama2"].encode("girl", add_special_tokens=False).ids
    assert tokenizer.decode([*byte_ids(run), *word]) == text + " girl"


def test_added_tokens_of_byte_level_are_their_own_text():
    # The letters of these are stand-ins of bytes, too, in the table of GPT-2.
    for name in ("café", "Ġx", "naïve<é>", "Ā"):
        for special in (False, True):
            whole = Tokenizer.from_str(byte_level_json())
            whole.add_tokens([AddedToken(name, special=special, normalized=False)])
            tokenizer = TextTokenizer(whole.to_str())
            ids = tokenizer.encode(f"un {name}!", add_special_tokens=False)
            assert whole.token_to_id(name) in ids
            assert tokenizer.decode(ids, skip_special_tokens=False) == f"un {name}!"
            assert stream(tokenizer, [[i] for i in ids], skip=False) == f"un {name}!"
            assert tokenizer.token_text(whole.token_to_id(name)) == name


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
