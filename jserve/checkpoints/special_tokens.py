"""Special tokens of a Hugging Face folder, as transformers 5 counts them. No JAX.

They stand in tokenizer_config.json and, in folders of older tools, in special_tokens_map.json. Both
may name tokens that tokenizer.json itself holds for ordinary ones.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from jserve.checkpoints.json_file import read_optional_json
from jserve.core.errors import ConfigError

TOKENIZER_CONFIG = "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_LISTS = ("additional_special_tokens", "extra_special_tokens")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


def read_tokenizer_config(folder: Path) -> dict[str, Any]:
    """Reads tokenizer_config.json, with special_tokens_map.json over it.

    The map counts, null included, unless the config has `added_tokens_decoder`, which is how
    newer tools write what the map was for. Lists of further tokens are joined.
    """
    config = read_optional_json(folder / TOKENIZER_CONFIG)
    if "added_tokens_decoder" in config:
        return config
    for name, value in read_optional_json(folder / SPECIAL_TOKENS_MAP).items():
        known = config.get(name)
        if name in _LISTS and isinstance(value, list) and isinstance(known, list):
            value = [*known, *(token for token in cast(list[Any], value) if token not in known)]
        config[name] = value
    return config


def named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The texts of the tokens that have a name, such as `eos_token`, as templates see them."""
    texts = {name: token_text(config.get(name)) for name in NAMES}
    return {name: text for name, text in texts.items() if text is not None}


def mark_special(tokenizer_json: str, config: Mapping[str, Any], ids: Mapping[str, int]) -> str:
    """Makes every token that `config` calls special one in the tokenizer, too.

    Such a token is found in text whatever the merges say, and is left out where special tokens
    are skipped. `ids` are those of all tokens; a token without an id is ignored, since the model
    has no row for it. The text comes back as it was when there is nothing to do.
    """
    wanted = {
        text: token
        for token in _special_tokens(config)
        if (text := token_text(token)) is not None and text in ids
    }
    whole = json.loads(tokenizer_json)
    added = {token["content"]: token for token in whole.get("added_tokens") or []}
    ordinary = [text for text in wanted if not added.get(text, {}).get("special")]
    if not ordinary:
        return tokenizer_json
    for text in ordinary:
        token = wanted[text]
        flags = token if isinstance(token, Mapping) else {}
        added[text] = {
            "id": ids[text],
            "content": text,
            **{name: bool(flags.get(name, False)) for name in _FLAGS},
            "special": True,
        }
    whole["added_tokens"] = sorted(added.values(), key=lambda token: token["id"])
    return json.dumps(whole, ensure_ascii=False)


def token_text(value: Any) -> str | None:
    """A token's text: itself, or the `content` of an object."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _special_tokens(config: Mapping[str, Any]) -> list[Any]:
    """Every token that the config calls special, as text or as an object."""
    tokens = [config.get(name) for name in NAMES]
    for name in _LISTS:
        further = config.get(name) or []
        if isinstance(further, Mapping):  # by names of the model's own
            further = list(further.values())
        if not isinstance(further, list):
            raise ConfigError(f"{TOKENIZER_CONFIG}: {name} must be a list of tokens")
        tokens += further
    decoder = config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, Mapping):
        raise ConfigError(f"{TOKENIZER_CONFIG}: added_tokens_decoder must be an object")
    tokens += [
        token for token in decoder.values() if isinstance(token, Mapping) and token.get("special")
    ]
    return tokens
