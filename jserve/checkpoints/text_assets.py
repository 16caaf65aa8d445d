"""The text side of a model: tokenizer, chat template, default sampling. No JAX.

Read from a Hugging Face folder, a GGUF file or a native folder, which keeps them in the Hugging
Face form.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jserve.checkpoints.gguf_header import GgufHeader, read_header
from jserve.checkpoints.gguf_tokenizer import adds_bos, end_token_ids, tokenizer_json
from jserve.checkpoints.hf_config import eos_token_ids
from jserve.checkpoints.json_file import read_optional_json
from jserve.checkpoints.special_tokens import (
    TOKENIZER_CONFIG,
    mark_special,
    named_tokens,
    read_tokenizer_config,
)
from jserve.core.errors import ConfigError

TOKENIZER = "tokenizer.json"
GENERATION_CONFIG = "generation_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
CONFIG = "config.json"
_GGUF_NAMES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
_GGUF_SAMPLING = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_k": "top_k",
    "general.sampling.top_p": "top_p",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TextAssets:
    """A model's tokenizer, chat template and defaults.

    `special_tokens` are the texts of bos_token, eos_token, unk_token, pad_token and the like, as
    chat templates see them. `add_bos` None leaves it to the tokenizer's post-processor.
    `generation_config` is Hugging Face's, as far as given.
    """

    tokenizer_json: str = field(repr=False)
    chat_template: str | None = None
    special_tokens: Mapping[str, str] = field(default_factory=dict[str, str])
    bos_token_id: int | None = None
    add_bos: bool | None = None
    eos_token_ids: tuple[int, ...] = ()  # each of them ends a generation
    generation_config: Mapping[str, Any] = field(default_factory=dict[str, Any])


def load_text_assets(path: str | Path) -> TextAssets:
    """Reads the text side of a model file or folder.

    Raises ConfigError naming the file and the remedy if there is no tokenizer or it is not
    supported.
    """
    path = Path(path)
    if path.is_dir():
        return _from_folder(path)
    if path.suffix == ".gguf" or path.is_file():
        return _from_gguf(read_header(path))
    raise ConfigError(f"{path}: there is no such model file or folder")


def save_text_assets(folder: Path, assets: TextAssets) -> None:
    """Writes the files of the Hugging Face form; `load_text_assets(folder)` gives them back."""
    generation = {**assets.generation_config, "eos_token_id": list(assets.eos_token_ids)}
    tokenizer_config: dict[str, Any] = dict(assets.special_tokens)
    if assets.add_bos is not None:
        tokenizer_config["add_bos_token"] = assets.add_bos
    _write(folder / TOKENIZER, assets.tokenizer_json)
    _write(folder / GENERATION_CONFIG, json.dumps(generation, indent=1))
    _write(folder / TOKENIZER_CONFIG, json.dumps(tokenizer_config, indent=1, ensure_ascii=False))
    if assets.chat_template is not None:
        _write(folder / CHAT_TEMPLATE, assets.chat_template)


def byte_level_assets(vocab: int, eos_token_ids: tuple[int, ...]) -> TextAssets:
    """A tokenizer without training: id b is byte b; text never yields higher ids.

    Raises ConfigError if `vocab` is under 256.
    """
    if vocab < 256:
        raise ConfigError(f"a byte-level tokenizer needs a vocabulary of 256 or more, not {vocab}")
    alphabet = _byte_alphabet()
    ends = [token_id for token_id in eos_token_ids if token_id >= 256]
    words = [f"<|end_{i}|>" if i in ends else f"{alphabet[32]}{i}" for i in range(256, vocab)]
    to_bytes = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    whole = {
        "version": "1.0",
        "added_tokens": [_special(token_id, words[token_id - 256]) for token_id in ends],
        "normalizer": None,
        "pre_tokenizer": to_bytes,
        "post_processor": None,
        "decoder": to_bytes,
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate([*alphabet, *words])},
            "merges": [],
        },
    }
    return TextAssets(
        tokenizer_json=json.dumps(whole, ensure_ascii=False),
        chat_template=(
            "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}"
        ),
        add_bos=False,
        eos_token_ids=eos_token_ids,
    )


def _from_gguf(header: GgufHeader) -> TextAssets:
    metadata = header.metadata
    tokenizer = tokenizer_json(header)  # checks what is used below
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    ids = {
        name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in _GGUF_NAMES.items()
    }
    for name, token_id in ids.items():
        if token_id is not None and not 0 <= token_id < len(tokens):
            raise ConfigError(
                f"{header.path}: tokenizer.ggml.{_GGUF_NAMES[name]}_token_id {token_id} is not "
                f"below {len(tokens)}, the number of tokens"
            )
    return TextAssets(
        tokenizer_json=tokenizer,
        chat_template=metadata.get("tokenizer.chat_template"),
        special_tokens={
            f"{name}_token": tokens[token_id]
            for name, token_id in ids.items()
            if token_id is not None
        },
        bos_token_id=ids["bos"],
        add_bos=adds_bos(header),
        eos_token_ids=end_token_ids(header),
        generation_config={
            name: metadata[key] for key, name in _GGUF_SAMPLING.items() if key in metadata
        },
    )


def _from_folder(folder: Path) -> TextAssets:
    tokenizer = _read_tokenizer(folder)
    config = read_tokenizer_config(folder)
    generation = read_optional_json(folder / GENERATION_CONFIG)
    special = named_tokens(config)
    ids = _token_ids(folder / TOKENIZER, tokenizer)
    bos = special.get("bos_token")
    if bos is not None and bos not in ids:
        raise ConfigError(f"{folder / TOKENIZER_CONFIG}: bos_token {bos!r} is not in {TOKENIZER}")
    ends = dict.fromkeys(
        (*eos_token_ids(generation), *eos_token_ids(read_optional_json(folder / CONFIG)))
    )
    if special.get("eos_token") in ids:
        ends[ids[special["eos_token"]]] = None
    return TextAssets(
        tokenizer_json=mark_special(tokenizer, config, ids),
        chat_template=_chat_template(folder, config),
        special_tokens=special,
        bos_token_id=ids[bos] if bos is not None else None,
        add_bos=config.get("add_bos_token"),
        eos_token_ids=tuple(ends),
        generation_config=generation,
    )


def _read_tokenizer(folder: Path) -> str:
    try:
        return (folder / TOKENIZER).read_bytes().decode()
    except FileNotFoundError:
        raise ConfigError(
            f"{folder}: has no {TOKENIZER}; save one with transformers' "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{folder / TOKENIZER}: cannot be read: {error}") from error


def _token_ids(path: Path, tokenizer: str) -> dict[str, int]:
    """Ids of all tokens by their text."""
    try:
        parsed = json.loads(tokenizer)
        ids: dict[str, int] = {}
        vocab = parsed["model"].get("vocab", {})
        if isinstance(vocab, dict):
            ids.update(vocab)
        ids.update({token["content"]: token["id"] for token in parsed.get("added_tokens") or []})
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{path}: is not a tokenizer: {error!r}") from error
    return ids


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    path = folder / CHAT_TEMPLATE
    if path.is_file():
        return path.read_bytes().decode()
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {str(entry.get("name")): entry.get("template") for entry in template}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise ConfigError(f"{folder / TOKENIZER_CONFIG}: chat_template must be text")
    return template


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="")


def _special(token_id: int, content: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": content, **flags, "special": True}


def _byte_alphabet() -> list[str]:
    """GPT-2's printable stand-in of every byte (openai/gpt-2, encoder.py)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    stand_ins = iter(range(256, 512))
    return [chr(byte if byte in printable else next(stand_ins)) for byte in range(256)]
