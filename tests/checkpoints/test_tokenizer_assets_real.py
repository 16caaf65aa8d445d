"""The tokenizers of both real vocabularies against llama.cpp's, on texts that are hard to cut."""

import gzip
import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from jserve.checkpoints.locate import text_assets_from_config
from jserve.config import load

ROOT = Path(".")
TOKENS = ROOT / "tests" / "fixtures" / "tokens"


def read(name: str):
    return json.loads(gzip.decompress((TOKENS / f"{name}.json.gz").read_bytes()))


@pytest.mark.network
@pytest.mark.parametrize(
    ("config", "differing"),
    [
        ("smollm2_135m", []),
        # llama.cpp takes </s> for a control token of every model. In Gemma's vocabulary, and in
        # Google's own tokenizer, it is an HTML tag like any other.
        ("gemma3_270m", ["</s>"]),
    ],
)
def test_every_text_is_cut_as_llama_cpp_does(config: str, differing: list[str]) -> None:
    model = load(str(ROOT / "configs" / f"{config}.py")).model
    assets = text_assets_from_config(model, lambda done, total: None)
    ours = Tokenizer.from_str(assets.tokenizer_json)
    texts, theirs = read("texts"), read(config)
    assert len(texts) >= 500
    for written_specials, expected in ((True, theirs["special"]), (False, theirs["plain"])):
        ours.encode_special_tokens = not written_specials
        wrong = [
            text
            for text, ids in zip(texts, expected, strict=True)
            if ours.encode(text, add_special_tokens=False).ids != ids
        ]
        assert wrong == ([] if written_specials else differing)


@pytest.mark.network
def test_ends_and_habits_of_the_real_models() -> None:
    smollm2, gemma = (
        text_assets_from_config(load(str(ROOT / f"configs/{name}.py")).model, lambda *_: None)
        for name in ("smollm2_135m", "gemma3_270m")
    )
    assert (smollm2.add_bos, smollm2.bos_token_id, smollm2.eos_token_ids) == (False, 1, (2, 0))
    assert (gemma.add_bos, gemma.bos_token_id, gemma.eos_token_ids) == (True, 2, (1, 106))
    assert gemma.chat_template is None  # a base model
