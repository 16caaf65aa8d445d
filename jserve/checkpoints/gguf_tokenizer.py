"""A `tokenizers` tokenizer.json from a GGUF file's metadata, equal to llama.cpp's own. No JAX.

Two kinds: `gpt2` (byte-level BPE, split by the expressions that tokenizer.ggml.pre names) and
`llama` (SentencePiece BPE: merges follow from the scores, unknown characters become bytes).
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from jserve.checkpoints.gguf_header import GgufHeader
from jserve.core.errors import ConfigError

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_SPACE = "▁"
# Control tokens that end a turn, whatever the metadata calls them (llama-vocab.cpp).
_END_OF_GENERATION = frozenset(
    (
        "<|eot_id|>",
        "<|im_end|>",
        "<|end|>",
        "<end_of_turn>",
        "<|endoftext|>",
        "<|eom_id|>",
        "<|end_of_text|>",
        "<EOT>",
        "</s>",
    )
)

_GPT2 = (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",)
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)


@dataclass(frozen=True, slots=True)
class _Split:
    """The rule by which one tokenizer.ggml.pre cuts text into words: expressions, in order."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False  # a word that is a token is that token, whatever its merges
    add_bos: bool = False  # unless the metadata says otherwise


_SMOLLM = _Split((r"\p{N}", *_GPT2))
_SPLITS: dict[str, _Split] = {
    "gpt-2": _Split(_GPT2),
    "smollm": _SMOLLM,
    "starcoder": _SMOLLM,
    "refact": _SMOLLM,
    "llama-bpe": _Split(_LLAMA3, ignore_merges=True, add_bos=True),
    "llama3": _Split(_LLAMA3, ignore_merges=True, add_bos=True),
    "llama-v3": _Split(_LLAMA3, ignore_merges=True, add_bos=True),
    "falcon3": _Split(_LLAMA3, ignore_merges=True, add_bos=True),
    "qwen2": _Split(_QWEN2),
    "deepseek-r1-qwen": _Split(_QWEN2),
    "tekken": _Split(_TEKKEN, ignore_merges=True, add_bos=True),
}


def adds_bos(header: GgufHeader) -> bool:
    """Whether a prompt begins with the BOS token, as llama.cpp decides it."""
    stated = header.metadata.get("tokenizer.ggml.add_bos_token")
    if stated is not None:
        return bool(stated)
    if header.metadata.get("tokenizer.ggml.model") == "llama":
        return True
    return _split_from_header(header).add_bos


def end_token_ids(header: GgufHeader) -> tuple[int, ...]:
    """Every token that ends a generation: the metadata's, and end-of-turn controls."""
    found: dict[int, None] = {}
    for name in ("eos", "eot", "eom"):
        token = header.metadata.get(f"tokenizer.ggml.{name}_token_id")
        if token is not None:
            found[int(token)] = None
    texts = header.metadata.get("tokenizer.ggml.tokens", [])
    types = header.metadata.get("tokenizer.ggml.token_type", np.zeros(len(texts)))
    for token in np.flatnonzero(np.asarray(types) == _CONTROL).tolist():
        if token < len(texts) and texts[token] in _END_OF_GENERATION:
            found[token] = None
    return tuple(found)


def tokenizer_json(header: GgufHeader) -> str:
    """The tokenizer of a GGUF file.

    Raises ConfigError naming the file if the kind of tokenizer is unknown or its metadata is
    missing or inconsistent.
    """
    kind = header.metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise ConfigError(
            f"{header.path}: tokenizer.ggml.model {kind!r} is not supported, only gpt2 and llama"
        )
    tokens = _tokens(header)
    types = _per_token(header, "token_type", len(tokens))
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise ConfigError(f"{header.path}: tokenizer.ggml.tokens has the same token twice")
    parts = _byte_level(header, vocab) if kind == "gpt2" else _sentence_piece(header, vocab, types)
    added = [
        {
            "id": token_id,
            "content": tokens[token_id],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": bool(types[token_id] != _USER_DEFINED),
        }
        for token_id in np.flatnonzero(np.isin(types, (_UNKNOWN, _CONTROL, _USER_DEFINED))).tolist()
    ]
    whole = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        **parts,
        "post_processor": _post_processor(header, tokens),
    }
    return json.dumps(whole, ensure_ascii=False)


def _tokens(header: GgufHeader) -> list[str]:
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise ConfigError(f"{header.path}: tokenizer.ggml.tokens is missing")
    return [token or f"[EMPTY_{token_id}]" for token_id, token in enumerate(tokens)]


def _per_token(header: GgufHeader, key: str, count: int) -> np.ndarray:
    values = header.metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(values, np.ndarray) or values.size < count:
        raise ConfigError(
            f"{header.path}: tokenizer.ggml.{key} is missing or shorter than the {count} tokens"
        )
    return values[:count]


def _split_from_header(header: GgufHeader) -> _Split:
    name = header.metadata.get("tokenizer.ggml.pre")
    if name not in _SPLITS:
        raise ConfigError(
            f"{header.path}: tokenizer.ggml.pre {name!r} is not supported; known are "
            f"{sorted(_SPLITS)}. Use the model's Hugging Face folder, which has a tokenizer.json"
        )
    return _SPLITS[name]


def _byte_level(header: GgufHeader, vocab: dict[str, int]) -> dict[str, Any]:
    split = _split_from_header(header)
    merges = header.metadata.get("tokenizer.ggml.merges")
    if not isinstance(merges, list):
        raise ConfigError(f"{header.path}: tokenizer.ggml.merges is missing")
    words = [
        {
            "type": "Split",
            "pattern": {"Regex": pattern},
            "behavior": "Isolated",
            "invert": False,
        }
        for pattern in split.patterns
    ]
    to_bytes = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*words, to_bytes]},
        "decoder": to_bytes,
        "model": _bpe(vocab, merges, ignore_merges=split.ignore_merges),
    }


def _sentence_piece(header: GgufHeader, vocab: dict[str, int], types: np.ndarray) -> dict[str, Any]:
    if f"<0x{0:02X}>" not in vocab:
        raise ConfigError(f"{header.path}: its SentencePiece tokenizer has no byte tokens")
    scores = _per_token(header, "scores", len(vocab))
    prefix = bool(header.metadata.get("tokenizer.ggml.add_space_prefix", True))
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    prepend = {"type": "Prepend", "prepend": _SPACE}
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    unknown = header.metadata.get("tokenizer.ggml.unknown_token_id")
    return {
        "normalizer": {"type": "Sequence", "normalizers": [prepend, replace]}
        if prefix
        else replace,
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _bpe(
            vocab,
            list(_merges_from_scores(vocab, scores, types)),
            byte_fallback=True,
            unknown=list(vocab)[unknown] if unknown is not None else None,
        ),
    }


def _merges_from_scores(
    vocab: dict[str, int], scores: np.ndarray, types: np.ndarray
) -> Iterator[tuple[str, str]]:
    """The merges by score, best first: SentencePiece merges any neighbours that make a token.

    Two ways to make the same token tie there, and the leftmost wins; here the one with the lower
    ids comes first, as in transformers' own converter.
    """
    tokens = list(vocab)
    find = vocab.get
    for token_id in np.argsort(-scores.astype(np.float64), kind="stable").tolist():
        token = tokens[token_id]
        if types[token_id] == _CONTROL:
            continue
        ways: list[tuple[int, int]] = []
        for cut in range(1, len(token)):
            left = find(token[:cut])
            if left is not None and (right := find(token[cut:])) is not None:
                ways.append((left, right))
        ways.sort()
        for left, right in ways:
            yield tokens[left], tokens[right]


def _bpe(
    vocab: dict[str, int],
    merges: list[Any],
    *,
    ignore_merges: bool = False,
    byte_fallback: bool = False,
    unknown: str | None = None,
) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unknown,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": byte_fallback,
        "byte_fallback": byte_fallback,
        "ignore_merges": ignore_merges,
        "vocab": vocab,
        "merges": merges,
    }


def _post_processor(header: GgufHeader, tokens: list[str]) -> dict[str, Any] | None:
    """The post-processor that adds BOS and EOS where the model wants them."""
    around: dict[str, int] = {}
    if adds_bos(header):
        around["bos"] = _special_id(header, "bos", len(tokens))
    if header.metadata.get("tokenizer.ggml.add_eos_token", False):
        around["eos"] = _special_id(header, "eos", len(tokens))
    if not around:
        return None
    text: list[dict[str, Any]] = [{"Sequence": {"id": "A", "type_id": 0}}]
    for name, token_id in around.items():
        piece = {"SpecialToken": {"id": tokens[token_id], "type_id": 0}}
        text.insert(0 if name == "bos" else len(text), piece)
    return {
        "type": "TemplateProcessing",
        "single": text,
        "pair": [*text, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {
            tokens[token_id]: {
                "id": tokens[token_id],
                "ids": [token_id],
                "tokens": [tokens[token_id]],
            }
            for token_id in around.values()
        },
    }


def _special_id(header: GgufHeader, name: str, count: int) -> int:
    key = f"tokenizer.ggml.{name}_token_id"
    token_id = header.metadata.get(key)
    if not isinstance(token_id, int) or token_id >= count:
        raise ConfigError(f"{header.path}: {key} is {token_id!r}, not a token id, but it is added")
    return token_id
