"""special_tokens_map.json and what makes a token special: the answers of transformers 5.24.0.

Each case was run through `PreTrainedTokenizerFast.from_pretrained` on the same folder.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from jserve.checkpoints.text_assets import byte_level_assets, load_text_assets
from jserve.core.errors import ConfigError
from jserve.gateway.tokenizer import TextTokenizer

END, WORD, OTHER = "<|end_299|>", "Ġ260", "Ġ261"  # special; words that no text yields
FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
AS_OBJECT = {"content": WORD, **FLAGS}
TEXT = f"a {WORD} {OTHER}{END}"
A, SPACE, BYTES = [97], [32], {WORD: list(WORD.encode()), OTHER: list(OTHER.encode())}


def folder(path: Path, config: dict[str, Any], tokens: dict[str, Any] | None) -> Path:
    (path / "tokenizer.json").write_text(byte_level_assets(300, (299,)).tokenizer_json)
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    if tokens is not None:
        (path / "special_tokens_map.json").write_text(json.dumps(tokens))
    return path


@pytest.mark.parametrize(
    ("config", "tokens", "named", "special"),
    [
        ({}, {"eos_token": END, "bos_token": WORD}, {"eos_token": END, "bos_token": WORD}, [WORD]),
        (
            {"eos_token": END, "bos_token": WORD},
            None,
            {"eos_token": END, "bos_token": WORD},
            [WORD],
        ),
        # The map comes before the config, its nulls, too …
        ({"eos_token": END}, {"eos_token": AS_OBJECT}, {"eos_token": WORD}, [WORD]),
        ({"eos_token": END}, {"eos_token": None}, {}, []),
        # … unless the config says how tokens were added.
        (
            {"eos_token": END, "added_tokens_decoder": {"299": {"content": END, "special": True}}},
            {"eos_token": WORD, "bos_token": OTHER},
            {"eos_token": END},
            [],
        ),
        (
            {"eos_token": END, "added_tokens_decoder": {"260": {**AS_OBJECT, "special": True}}},
            None,
            {"eos_token": END},
            [WORD],
        ),
        (
            {},
            {"cls_token": WORD, "mask_token": OTHER},
            {"cls_token": WORD, "mask_token": OTHER},
            [WORD, OTHER],
        ),
        ({"extra_special_tokens": [WORD]}, {"extra_special_tokens": [OTHER]}, {}, [WORD, OTHER]),
        ({"additional_special_tokens": [WORD]}, None, {}, [WORD]),
        # A name without a row in the vocabulary.
        ({"eos_token": END}, {"pad_token": "<pad>"}, {"eos_token": END, "pad_token": "<pad>"}, []),
    ],
)
def test_tokens_count_as_transformers_counts_them(tmp_path, config, tokens, named, special):
    assets = load_text_assets(folder(tmp_path, config, tokens))
    assert assets.special_tokens == named
    end = {END: (299,), WORD: (260,)}.get(named.get("eos_token", ""), ())
    assert assets.eos_token_ids == end
    tokenizer = TextTokenizer(assets.tokenizer_json)
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    word = [260] if WORD in special else BYTES[WORD]
    other = [261] if OTHER in special else BYTES[OTHER]
    assert ids == [*A, *SPACE, *word, *SPACE, *other, 299]
    shown = "".join(part for part in ("a ", WORD, " ", OTHER) if part not in special)
    assert tokenizer.decode(ids) == shown
    assert tokenizer.decode(ids, skip_special_tokens=False) == TEXT


def test_an_added_token_becomes_special_where_its_name_says_so(tmp_path):
    assets = byte_level_assets(300, (299,))
    whole = json.loads(assets.tokenizer_json)
    whole["added_tokens"].insert(0, {"id": 260, "content": WORD, **FLAGS, "special": False})
    folder(tmp_path, {"eos_token": END}, {"bos_token": WORD})
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    loaded = Tokenizer.from_str(load_text_assets(tmp_path).tokenizer_json)
    assert loaded.decode([97, 260, 299]) == "a"
    assert loaded.get_vocab_size() == 300


def test_a_tokenizer_with_nothing_to_mark_stays_as_it_is(tmp_path):
    source = byte_level_assets(300, (299,)).tokenizer_json
    assert load_text_assets(folder(tmp_path, {"eos_token": END}, None)).tokenizer_json == source


@pytest.mark.parametrize(
    ("config", "tokens", "message"),
    [
        ({}, [1], r"special_tokens_map\.json: must hold a JSON object"),
        ({"additional_special_tokens": "x"}, None, "additional_special_tokens must be a list"),
        ({"added_tokens_decoder": [1]}, None, "added_tokens_decoder must be an object"),
        ({}, {"bos_token": "<none>"}, r"bos_token '<none>' is not in tokenizer\.json"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, config, tokens, message):
    with pytest.raises(ConfigError, match=message):
        load_text_assets(folder(tmp_path, config, tokens))
