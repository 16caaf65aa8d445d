"""Small random checkpoints of every family, as Hugging Face folders, with transformers' logits."""

import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from float64 import computing
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB = 256
TOKENS = 48
FLOAT64_POSITIONS = np.arange(3, TOKENS, 4, dtype=np.int32)
# An ablation that moves no logit by this much would mean that the fixture cannot see the feature.
MIN_EFFECT = 1e-2


@dataclass(frozen=True)
class Case:
    """One checkpoint. `config` is the text of config.json, in the form that the hub has it.

    `ablations` are changes of the config that must change the logits: proof that the fixture
    would notice if the feature were left out. `weights` seeds the weights; cases that share it
    share them (and so the file).
    """

    name: str
    config: dict[str, Any]
    weights: str = ""
    stored: str = "float32"
    shards: int = 1
    prefill: int = TOKENS  # the rest is decoded one token at a time with the cache
    ablations: tuple[dict[str, Any], ...] = field(default=())


def _config(architecture: str, model_type: str, **changes: Any) -> dict[str, Any]:
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float32",
    } | changes


def _llama(**changes: Any) -> dict[str, Any]:
    return _config("LlamaForCausalLM", "llama", **changes)


def _gemma3(**changes: Any) -> dict[str, Any]:
    config = _config(
        "Gemma3ForCausalLM",
        "gemma3_text",
        num_hidden_layers=4,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=40,
        rms_norm_eps=1e-6,
        hidden_activation="gelu_pytorch_tanh",
        query_pre_attn_scalar=24,  # not head_dim: as in the 27B model
        sliding_window=8,
        attention_bias=False,
        **changes,
    )
    # As on the hub: the activation has another name, tied embeddings are the default.
    return {k: v for k, v in config.items() if k not in ("hidden_act", "tie_word_embeddings")}


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # head_dim 8 has wavelengths 6, 63, 628 and 6283: one kept, one blended, two stretched
    "original_max_position_embeddings": 128,
}
QWEN2 = _config("Qwen2ForCausalLM", "qwen2", rope_theta=1e6, rms_norm_eps=1e-6)
QWEN3 = _config(
    "Qwen3ForCausalLM",
    "qwen3",
    head_dim=16,
    rope_theta=1e6,
    rms_norm_eps=1e-6,
    attention_bias=False,
    sliding_window=None,
    use_sliding_window=False,
    tie_word_embeddings=True,
)
MISTRAL = _config(
    "MistralForCausalLM", "mistral", num_key_value_heads=1, head_dim=16, sliding_window=8
)

CASES = (
    Case("llama", _llama(), weights="llama", ablations=({"rope_theta": 500.0},)),
    Case(
        "llama_linear",
        _llama(rope_scaling={"type": "linear", "factor": 4.0}),  # the old key, `type`
        weights="llama",
        ablations=({"rope_scaling": None},),
    ),
    Case(
        "llama_dynamic",
        {k: v for k, v in _llama(max_position_embeddings=32).items() if k != "rope_theta"}
        | {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}},
        weights="llama",
        prefill=32,
        ablations=({"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},),
    ),
    Case(
        "llama_llama3",
        _llama(rope_scaling=LLAMA3_ROPE, eos_token_id=[2, 3]),
        weights="llama",
        ablations=(
            {"rope_scaling": None},
            {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        ),
    ),
    Case("llama_sharded", _llama(), weights="llama", shards=2),
    # attention_bias of llama gives o_proj a bias too, unlike qwen2's
    # (and here, as in the oldest configs, no num_key_value_heads: as many as query heads)
    Case(
        "llama_attention_bias",
        {k: v for k, v in _llama(attention_bias=True).items() if k != "num_key_value_heads"},
    ),
    Case("smollm2", _llama(tie_word_embeddings=True, rope_theta=1e5, num_key_value_heads=1)),
    Case(
        "mistral",
        MISTRAL,
        ablations=({"sliding_window": None}, {"sliding_window": 7}, {"sliding_window": 9}),
    ),
    Case("qwen2", QWEN2),
    Case(
        "qwen2_window",  # tied, and the first layer sees all
        QWEN2
        | {
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 8,
            "max_window_layers": 1,
        },
        ablations=(
            {"use_sliding_window": False},
            {"max_window_layers": 0},
            {"sliding_window": 9},
        ),
    ),
    Case("qwen3", QWEN3, weights="qwen3", ablations=({"rope_theta": 1e4},)),
    Case(
        "qwen3_bf16",
        QWEN3 | {"torch_dtype": "bfloat16"},
        weights="qwen3",
        stored="bfloat16",
    ),
    Case(
        "gemma3",  # local, local, global, local
        _gemma3(
            rope_theta=1e6, rope_local_base_freq=100.0, sliding_window_pattern=3, rope_scaling=None
        ),
        weights="gemma3",
        ablations=(
            {"sliding_window": 9},
            {"sliding_window_pattern": 2},
            {"rope_local_base_freq": 1e6},
            {"rope_theta": 100.0},
            {"query_pre_attn_scalar": 16},
        ),
    ),
    Case(
        "gemma3_linear",  # as from 4B on: global layers scaled; the config form of transformers 5
        {k: v for k, v in _gemma3().items() if k != "rope_theta"}
        | {
            "layer_types": [
                "sliding_attention",
                "full_attention",
                "sliding_attention",
                "full_attention",
            ],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4},
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        },
        weights="gemma3",
        ablations=(
            {
                "rope_parameters": {
                    "full_attention": {"rope_type": "default", "rope_theta": 1e4},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
                }
            },
        ),
    ),
)


def make(folder: Path) -> None:
    """Writes one folder per case: config, generation config, weights and logits.npz."""
    for case in CASES:
        _make_case(case, folder / case.name)


def _make_case(case: Case, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", case.config)
    eos = case.config["eos_token_id"]
    _write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": eos})
    _write_weights(case, folder)

    token_ids = _token_ids(case)
    logits = _logits(case, folder, token_ids, torch.float32)
    exact = _logits(case, folder, token_ids, torch.float64)
    error = np.abs(logits - exact)
    if not (0 < error.max() < 3e-5 and 1 < logits.std() < 6):
        raise AssertionError(f"{case.name}: error {error.max():.1e}, std {logits.std():.2f}")
    for changes in case.ablations:
        ablated = _logits(case, folder, token_ids, torch.float32, changes)
        effect = np.abs(ablated - logits).max()
        if effect < MIN_EFFECT:
            raise AssertionError(f"{case.name}: {changes} changes the logits by {effect:.1e} only")
    np.savez_compressed(
        folder / "logits.npz",
        token_ids=token_ids,
        prefill=np.int32(case.prefill),
        logits=logits,
        float64_positions=FLOAT64_POSITIONS,
        logits_float64=exact[FLOAT64_POSITIONS],
        max_abs_error=np.float64(error.max()),
    )


def _token_ids(case: Case) -> np.ndarray:
    ids = _rng(case, "token_ids").integers(4, VOCAB, TOKENS)
    ids[0] = 1  # BOS
    return ids.astype(np.int32)


def _rng(case: Case, name: str) -> np.random.Generator:
    return np.random.default_rng([zlib.crc32((case.weights or case.name).encode()), zlib.crc32(name.encode())])


def _write_weights(case: Case, folder: Path) -> None:
    """Weights are bfloat16 values in every case, so that storing them as such loses nothing."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    dtype = getattr(torch, case.stored)
    weights = {
        name: torch.from_numpy(_weight(case, name, tuple(p.shape))).to(torch.bfloat16).to(dtype)
        for name, p in model.named_parameters()  # tied ones once
    }
    if case.shards == 1:
        _save(weights, folder / "model.safetensors")
        return
    names, weight_map = sorted(weights), {}
    size = -(-len(names) // case.shards)
    for shard in range(case.shards):
        file = f"model-{shard + 1:05d}-of-{case.shards:05d}.safetensors"
        part = {name: weights[name] for name in names[shard * size : (shard + 1) * size]}
        _save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    total = sum(w.numel() * w.element_size() for w in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", index)


def _save(weights: dict[str, torch.Tensor], path: Path) -> None:
    save_file(weights, path, {"format": "pt"})
    path.chmod(0o644)


def _weight(case: Case, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Scaled so that attention is neither uniform nor one-hot and logits have a spread of 2–4."""
    noise = _rng(case, name).standard_normal(shape, np.float32)
    if name.endswith("bias"):
        return 0.3 * noise
    if name.endswith("norm.weight"):
        return 0.2 * noise + (0 if "gemma3" in case.name else 1)
    if "embed_tokens" in name:
        return noise * (0.5 if case.config.get("tie_word_embeddings", True) else 1.0)
    gain = 2.0 if "lm_head" in name else 1.3
    return noise * np.float32(gain / shape[1] ** 0.5)


def _logits(
    case: Case,
    folder: Path,
    token_ids: np.ndarray,
    dtype: torch.dtype,
    changes: dict[str, Any] | None = None,
) -> np.ndarray:
    """Eager attention; prefill of `case.prefill` tokens, then single steps. [tokens, vocab]"""
    with computing(dtype, strict=False):
        model = _load(folder, case.config | (changes or {}), dtype)
    ids = torch.from_numpy(token_ids)[None].long()
    with computing(dtype):
        result = model(ids[:, : case.prefill], use_cache=True)
        rows = [result.logits[0]]
        for position in range(case.prefill, TOKENS):
            step = ids[:, position : position + 1]
            result = model(step, past_key_values=result.past_key_values, use_cache=True)
            rows.append(result.logits[0])
    return torch.cat(rows).numpy()


def _load(folder: Path, config: dict[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    keys = {k: v for k, v in config.items() if k != "model_type"}
    model, info = AutoModelForCausalLM.from_pretrained(
        folder,
        config=AutoConfig.for_model(config["model_type"], **keys),
        dtype=dtype,
        attn_implementation="eager",
        output_loading_info=True,
    )
    if any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")):
        raise AssertionError(f"{folder}: {info}")
    stray = [name for name, t in model.named_buffers() if t.dtype not in (dtype, torch.int64)]
    if stray or any(p.dtype is not dtype for p in model.parameters()):
        raise AssertionError(f"{folder}: not all of the model is {dtype}: {stray}")
    return model.eval()


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
