"""Tokenizers from GGUF metadata against independent ones; the text side of each format."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from jserve.checkpoints.gguf_header import GgufHeader
from jserve.checkpoints.gguf_tokenizer import end_token_ids, tokenizer_json
from jserve.checkpoints.text_assets import (
    TextAssets,
    byte_level_assets,
    load_text_assets,
    save_text_assets,
)
from jserve.core.errors import ConfigError
from jserve.gateway.tokenizer import TextTokenizer
from tests.model_files import byte_level_metadata, tiny_weights, write_gguf

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def header(metadata: dict[str, Any]) -> GgufHeader:
    arrays = {
        key: np.array(value) if isinstance(value, list) and not isinstance(value[0], str) else value
        for key, value in metadata.items()
    }
    return GgufHeader(Path("test.gguf"), arrays, {}, 0)


def tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_str(tokenizer_json(header(metadata)))


def sentence_piece(pieces: dict[str, float], **keys: Any) -> dict[str, Any]:
    """Metadata of a SentencePiece vocabulary: specials, bytes, then `pieces` with their scores."""
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *pieces]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + list(pieces.values()),
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(pieces),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    } | {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


def greedy_pieces(text: str, pieces: dict[str, float]) -> list[str]:
    """SentencePiece BPE by its definition: merge the best scored, then leftmost, pair."""
    symbols = list(text)
    while True:
        pairs = [
            (-pieces[a + b], i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in pieces
        ]
        if not pairs:
            break
        _, i = min(pairs)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    return [
        part
        for s in symbols
        for part in ([s] if s in pieces else [f"<0x{byte:02X}>" for byte in s.encode()])
    ]


@st.composite
def vocabularies(draw: st.DrawFn) -> dict[str, float]:
    """Characters, and tokens that each join two earlier ones; distinct scores."""
    known = ["▁", "a", "b", "c", "é"]
    for _ in range(draw(st.integers(0, 12))):
        joined = draw(st.sampled_from(known)) + draw(st.sampled_from(known))
        if joined not in known and len(set(joined)) == len(joined):  # ties: see the module
            known.append(joined)
    order = draw(st.permutations(range(len(known))))
    return {piece: -float(rank) for piece, rank in zip(known, order, strict=True)}


@settings(max_examples=200, deadline=None)
@given(pieces=vocabularies(), text=st.text(alphabet="abcé d😀", max_size=20))
def test_scores_merge_as_sentencepiece_defines(pieces: dict[str, float], text: str) -> None:
    ours = tokenizer(sentence_piece(pieces, add_space_prefix=False))
    encoded = ours.encode(text, add_special_tokens=False)
    assert encoded.tokens == greedy_pieces(text.replace(" ", "▁"), pieces)
    assert ours.decode(encoded.ids) == text


def test_space_prefix_bos_and_special_tokens_of_sentencepiece() -> None:
    pieces = {"▁": -1.0, "a": -2.0, "▁a": -3.0}
    prefixed = tokenizer(sentence_piece(pieces))  # both are llama.cpp's defaults
    encoded = prefixed.encode("a a</s>a")
    assert encoded.tokens == ["<s>", "▁a", "▁a", "</s>", "▁a"]
    assert prefixed.decode(encoded.ids) == "a a a"
    plain = tokenizer(sentence_piece(pieces, add_space_prefix=False, add_bos_token=False))
    assert plain.encode("a a").tokens == ["a", "▁a"]
    both = tokenizer(sentence_piece(pieces, add_eos_token=True))
    assert both.encode("a").tokens == ["<s>", "▁a", "</s>"]


def test_byte_level_merges_and_control_tokens() -> None:
    ours = tokenizer(byte_level_metadata())
    assert ours.encode("hello world").tokens == ["hello", "Ġwo", "r", "l", "d"]
    assert ours.encode("a<|im_end|>hell").tokens == ["a", "<|im_end|>", "hell"]
    assert ours.decode(ours.encode("<think>hello<|im_end|>").ids) == "<think>hello"


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=40))
def test_byte_level_round_trip(text: str) -> None:
    ours = tokenizer(byte_level_metadata())
    assert ours.decode(ours.encode(text).ids) == text


@pytest.mark.parametrize(
    ("pre", "words"),
    [
        ("gpt-2", ["I", "'ll", "Ġpay", "Ġ1234", "Ċ", "Ċ", "ok"]),
        ("smollm", ["I", "'ll", "Ġpay", "Ġ", "1", "2", "3", "4", "Ċ", "Ċ", "ok"]),
        ("llama-bpe", ["I", "'ll", "Ġpay", "Ġ", "123", "4", "ĊĊ", "ok"]),
        ("qwen2", ["I", "'ll", "Ġpay", "Ġ", "1", "2", "3", "4", "ĊĊ", "ok"]),
        ("tekken", ["I", "'ll", "Ġpay", "Ġ", "1", "2", "3", "4", "ĊĊ", "ok"]),
    ],
)
def test_the_expressions_of_each_pre(pre: str, words: list[str]) -> None:
    ours = tokenizer(byte_level_metadata() | {"tokenizer.ggml.pre": pre})
    cut = ours.pre_tokenizer.pre_tokenize_str("I'll pay 1234\n\nok")
    assert [word for word, _ in cut] == words


def test_bos_of_llama3_is_added_unless_metadata_says_no() -> None:
    metadata = byte_level_metadata() | {"tokenizer.ggml.pre": "llama-bpe"}
    assert tokenizer(metadata).encode("a").tokens == ["<|im_start|>", "a"]
    metadata["tokenizer.ggml.add_bos_token"] = False
    assert tokenizer(metadata).encode("a").tokens == ["a"]


def test_every_end_token_is_found() -> None:
    found = end_token_ids(header(byte_level_metadata() | {"tokenizer.ggml.eot_token_id": 7}))
    assert found == (264, 7, 262)
    pieces = {"<end_of_turn>": 0.0, "</s>x": -1.0}
    metadata = sentence_piece(pieces)
    assert end_token_ids(header(metadata)) == (2,)  # an end only if it is a control token
    metadata["tokenizer.ggml.token_type"][259] = 3
    assert end_token_ids(header(metadata)) == (2, 259)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "bert"}, r"tokenizer\.ggml\.model 'bert' is not supported"),
        ({"model": None}, "model None is not supported"),
        ({"pre": "unheard-of"}, r"tokenizer\.ggml\.pre 'unheard-of' is not supported; known are"),
        ({"pre": None}, "pre None is not supported"),
        ({"merges": None}, "merges is missing"),
        ({"tokens": None}, "tokens is missing"),
        ({"tokens": ["a", "a", "b"]}, "the same token twice"),
        ({"token_type": [1, 1]}, "token_type is missing or shorter"),
        ({"add_bos_token": True, "bos_token_id": 999}, "bos_token_id is 999, not a token id"),
    ],
)
def test_what_is_wrong_with_metadata_is_named(change: dict[str, Any], message: str) -> None:
    metadata = byte_level_metadata()
    metadata |= {f"tokenizer.ggml.{key}": value for key, value in change.items()}
    with pytest.raises(ConfigError, match=message):
        tokenizer_json(header({k: v for k, v in metadata.items() if v is not None}))


def test_assets_of_a_gguf_file_survive_the_native_form(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "llama", tiny_weights("llama"))
    assets = load_text_assets(path)
    assert assets.bos_token_id == 263
    assert assets.special_tokens == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
    assert assets.eos_token_ids == (264, 262)
    assert assets.add_bos is False
    assert assets.chat_template is not None
    assert "\r\n" in assets.chat_template
    save_text_assets(tmp_path, assets)
    again = load_text_assets(tmp_path)
    assert again == TextAssets(
        **{
            name: getattr(assets, name)
            for name in TextAssets.__slots__
            if name != "generation_config"
        },
        generation_config={"eos_token_id": [264, 262]},
    )


def test_assets_of_a_hugging_face_folder(tmp_path: Path) -> None:
    assets = byte_level_assets(300, (257,))
    (tmp_path / "tokenizer.json").write_text(assets.tokenizer_json)
    (tmp_path / "config.json").write_text('{"eos_token_id": [5, 6]}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 6, "top_k": 3}')
    config = {
        "bos_token": {"content": "a", "lstrip": False},
        "eos_token": "b",
        "pad_token": None,
        "add_bos_token": True,
        "chat_template": [
            {"name": "tool_use", "template": "T"},
            {"name": "default", "template": "D"},
        ],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    found = load_text_assets(tmp_path)
    assert found.bos_token_id == ord("a")
    assert found.eos_token_ids == (6, 5, ord("b"))
    assert found.special_tokens == {"bos_token": "a", "eos_token": "b"}
    assert found.add_bos is True
    assert found.chat_template == "D"
    assert found.generation_config["top_k"] == 3
    (tmp_path / "chat_template.jinja").write_text("J")
    assert load_text_assets(tmp_path).chat_template == "J"


def test_what_is_wrong_with_a_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json; save one"):
        load_text_assets(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer\.json: is not a tokenizer"):
        load_text_assets(tmp_path)
    (tmp_path / "tokenizer.json").write_text(byte_level_assets(256, ()).tokenizer_json)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<none>"}')
    with pytest.raises(ConfigError, match=r"bos_token '<none>' is not in tokenizer\.json"):
        load_text_assets(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json: is not JSON"):
        load_text_assets(tmp_path)
    with pytest.raises(ConfigError, match="no such model"):
        load_text_assets(tmp_path / "nowhere")


def test_the_byte_level_tokenizer_of_random_weights() -> None:
    assets = byte_level_assets(400, (7, 300))
    ours = Tokenizer.from_str(assets.tokenizer_json)
    assert ours.get_vocab_size() == 400
    text = "Grüße, 世界 \n\t\x00"
    assert ours.encode(text).ids == list(text.encode())
    assert ours.decode(list(text.encode())) == text
    assert ours.encode("<|end_300|>").ids == [300]
    assert all(ours.decode([token_id]) for token_id in range(301, 400))
    with pytest.raises(ConfigError, match="256 or more"):
        byte_level_assets(255, ())


def test_an_added_token_of_a_gguf_file_is_its_own_text() -> None:
    metadata = byte_level_metadata()
    tokens = metadata["tokenizer.ggml.tokens"]
    names = ["café", "<naïve Ġ>"]
    count = len(tokens)
    metadata["tokenizer.ggml.tokens"] = [*tokens, *names]
    types = metadata["tokenizer.ggml.token_type"]
    metadata["tokenizer.ggml.token_type"] = [*types, 4, 3]  # user-defined, control
    ours = TextTokenizer(tokenizer_json(header(metadata)))
    text = f"un {names[0]}, {names[1]}é"
    ids = ours.encode(text)
    assert {count, count + 1} < set(ids)
    assert ours.decode(ids, skip_special_tokens=False) == text  # as llama.cpp's token_to_piece
    assert ours.decode(ids) == "un café, é"
