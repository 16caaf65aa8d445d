"""Small random checkpoints of every family, as Hugging Face folders, with transformers' logits."""

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import CASES, TOKENS, VOCAB, Case
from float64 import computing
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

FLOAT64_POSITIONS = np.arange(3, TOKENS, 4, dtype=np.int32)
# An ablation that moves no logit by this much would mean that the fixture cannot see the feature.
MIN_EFFECT = 1e-2
EXPERTS = {"num_experts", "num_local_experts"}


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
    return np.random.default_rng(
        [zlib.crc32((case.weights or case.name).encode()), zlib.crc32(name.encode())]
    )


def _write_weights(case: Case, folder: Path) -> None:
    """Weights are bfloat16 values in every case, so that storing them as such loses nothing."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    dtype = getattr(torch, case.stored)
    weights = {
        name: torch.from_numpy(_weight(case, name, tuple(p.shape))).to(torch.bfloat16).to(dtype)
        for name, p in model.named_parameters()  # tied ones once
    }
    # In memory all experts are one tensor; in files, as on the hub, each has its own.
    weights = {n: w.contiguous() for n, w in revert_weight_conversion(model, weights).items()}
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
    return noise * np.float32(gain / shape[-1] ** 0.5)


def _logits(
    case: Case,
    folder: Path,
    token_ids: np.ndarray,
    dtype: torch.dtype,
    changes: dict[str, Any] | None = None,
) -> np.ndarray:
    """Eager attention; prefill of `case.prefill` tokens, then single steps: [tokens, vocab]."""
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
        experts_implementation="eager" if EXPERTS & config.keys() else None,
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
