"""Tiny model files for tests, written with the gguf and safetensors packages."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.numpy import save_file

Weights = dict[str, np.ndarray]

LAYERS, MODEL_DIM, FFN_DIM, Q_HEADS, KV_HEADS, HEAD_DIM, VOCAB = 2, 64, 96, 4, 2, 16, 320
EXPERTS, EXPERTS_PER_TOKEN, EXPERT_FFN_DIM = 3, 2, 32
_ARCHS = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma3": gguf.MODEL_ARCH.GEMMA3,
    "qwen3moe": gguf.MODEL_ARCH.QWEN3MOE,
}
_EXPERT_NAMES = {  # prefixes, and names of an expert's weights into and out of it
    "mixtral": ("block_sparse_moe.", ("w1", "w3", "w2")),
    "qwen3moe": ("mlp.", ("gate_proj", "up_proj", "down_proj")),
}


def tiny_weights(arch: str, *, tied: bool = True, seed: int = 0) -> Weights:
    """Random weights under Hugging Face's names, of the sizes above.

    `arch` is one of llama.cpp's, or "mixtral": its llama with experts.
    """
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, MODEL_DIM)}
    for layer in range(LAYERS):
        p = f"model.layers.{layer}."
        heads = {"q": Q_HEADS, "k": KV_HEADS, "v": KV_HEADS}
        for part, count in heads.items():
            shapes[f"{p}self_attn.{part}_proj.weight"] = (count * HEAD_DIM, MODEL_DIM)
            if arch == "qwen2":
                shapes[f"{p}self_attn.{part}_proj.bias"] = (count * HEAD_DIM,)
        shapes[f"{p}self_attn.o_proj.weight"] = (MODEL_DIM, Q_HEADS * HEAD_DIM)
        shapes |= {f"{p}{name}.weight": shape for name, shape in _ffn_shapes(arch).items()}
        norms = ["input_layernorm", "post_attention_layernorm"]
        if arch == "gemma3":
            norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        shapes |= {f"{p}{norm}.weight": (MODEL_DIM,) for norm in norms}
        if arch in ("qwen3", "gemma3", "qwen3moe"):
            shapes[f"{p}self_attn.q_norm.weight"] = (HEAD_DIM,)
            shapes[f"{p}self_attn.k_norm.weight"] = (HEAD_DIM,)
    shapes["model.norm.weight"] = (MODEL_DIM,)
    if not tied:
        shapes["lm_head.weight"] = (VOCAB, MODEL_DIM)
    rng = np.random.default_rng(seed)
    # Halves of small integers: exact in every float type, and after adding one.
    halves = {name: rng.integers(-7, 8, shape) for name, shape in shapes.items()}
    return {name: value.astype(np.float32) / 2 for name, value in halves.items()}


def _ffn_shapes(arch: str) -> dict[str, tuple[int, ...]]:
    if arch not in _EXPERT_NAMES:
        into = (FFN_DIM, MODEL_DIM)
        return {"mlp.gate_proj": into, "mlp.up_proj": into, "mlp.down_proj": into[::-1]}
    block, (gate, up, down) = _EXPERT_NAMES[arch]
    into = (FFN_DIM if arch == "mixtral" else EXPERT_FFN_DIM, MODEL_DIM)
    shapes: dict[str, tuple[int, ...]] = {f"{block}gate": (EXPERTS, MODEL_DIM)}
    for expert in range(EXPERTS):
        p = f"{block}experts.{expert}."
        shapes |= {p + gate: into, p + up: into, p + down: into[::-1]}
    return shapes


def gguf_metadata(arch: str) -> dict[str, Any]:
    """The keys that llama.cpp's converter writes for such a model, and a byte-level tokenizer."""
    keys: dict[str, Any] = {
        "block_count": LAYERS,
        "context_length": 128,
        "embedding_length": MODEL_DIM,
        "feed_forward_length": FFN_DIM,
        "attention.head_count": Q_HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.key_length": HEAD_DIM,
        "attention.value_length": HEAD_DIM,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 5000.0,
    }
    if arch == "gemma3":
        keys["attention.sliding_window"] = 8
    if arch in _EXPERT_NAMES:
        keys |= {"expert_count": EXPERTS, "expert_used_count": EXPERTS_PER_TOKEN}
    if arch == "qwen3moe":
        keys["expert_feed_forward_length"] = EXPERT_FFN_DIM
    arch = gguf_arch(arch)
    return {f"{arch}.{key}": value for key, value in keys.items()} | byte_level_metadata()


def gguf_arch(arch: str) -> str:
    """The value of `general.architecture`."""
    return "llama" if arch == "mixtral" else arch


def byte_level_metadata() -> dict[str, Any]:
    """A GPT-2-like tokenizer: one token per byte, some merges, and control tokens at the end."""
    alphabet = gpt2_alphabet()
    merged = ["he", "ll", "hell", "hello", "Ġw", "Ġwo"]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>"]
    filler = [f"<unused{i}>" for i in range(VOCAB - len(alphabet) - len(merged) - len(special))]
    tokens = [*alphabet, *merged, *special, *filler]
    types = [1] * (len(alphabet) + len(merged)) + [3, 3, 3, 4] + [1] * len(filler)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": ["h e", "l l", "he ll", "hell o", "Ġ w", "Ġw o"],
        "tokenizer.ggml.bos_token_id": tokens.index("<|im_start|>"),
        "tokenizer.ggml.eos_token_id": tokens.index("<|im_end|>"),
        "tokenizer.chat_template": "{% for m in messages %}{{ m.content }}\r\n{% endfor %}",
    }


def write_gguf(
    path: Path,
    arch: str,
    weights: Mapping[str, np.ndarray],
    *,
    metadata: Mapping[str, Any] | None = None,
    quantized: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    extra: Mapping[str, np.ndarray] | None = None,
) -> Path:
    """Writes a GGUF file as llama.cpp's convert_hf_to_gguf does; matrices are `quantized`."""
    writer = gguf.GGUFWriter(path, gguf_arch(arch))
    for key, value in (gguf_metadata(arch) if metadata is None else metadata).items():
        _add(writer, key, value)
    names = gguf.get_tensor_name_map(_ARCHS.get(arch, gguf.MODEL_ARCH.LLAMA), LAYERS)
    for name, value in _merged_experts(weights).items():
        stem, _, kind = name.rpartition(".")
        stored = _as_converted(arch, name, value)
        found = names.get_name(stem)
        _add_tensor(writer, f"{found or stem}.{kind}", stored, quantized)
    for name, value in (extra or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_hf(
    folder: Path, config: Mapping[str, Any], weights: Mapping[str, np.ndarray], tokenizer: str
) -> Path:
    """A Hugging Face folder with one safetensors file."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(tokenizer)
    save_file(dict(weights), folder / "model.safetensors")
    return folder


def gpt2_alphabet() -> list[str]:
    """The character that stands for each byte, from openai/gpt-2's encoder.py."""
    bs = list(range(ord("!"), ord("~") + 1))
    bs += list(range(ord("¡"), ord("¬") + 1)) + list(range(ord("®"), ord("ÿ") + 1))
    cs, n = bs[:], 0
    for b in range(2**8):
        if b not in bs:
            bs.append(b)
            cs.append(2**8 + n)
            n += 1
    return [chr(c) for _, c in sorted(zip(bs, cs, strict=True))]


def _merged_experts(weights: Mapping[str, np.ndarray]) -> Weights:
    """The weights with those of all experts in one, as the converter stacks them."""
    merged: dict[str, list[np.ndarray]] = {}
    for name, value in weights.items():
        merged.setdefault(re.sub(r"experts\.\d+\.", "experts.", name), []).append(value)
    return {n: np.stack(v) if ".experts." in n else v[0] for n, v in merged.items()}


def _as_converted(arch: str, name: str, value: np.ndarray) -> np.ndarray:
    """Changes of the converter, in its own words (conversion/llama.py, conversion/gemma.py)."""
    if arch in ("llama", "mixtral") and ("q_proj" in name or "k_proj" in name):
        n_head = Q_HEADS if "q_proj" in name else KV_HEADS
        return (
            value.reshape(n_head, 2, value.shape[0] // n_head // 2, *value.shape[1:])
            .swapaxes(1, 2)
            .reshape(value.shape)
        )
    if arch == "gemma3" and name.endswith("norm.weight"):
        return value + np.float32(1)
    return value


def _add_tensor(
    writer: gguf.GGUFWriter, name: str, value: np.ndarray, kind: gguf.GGMLQuantizationType
) -> None:
    value = np.ascontiguousarray(value)
    if value.ndim == 1 or kind == gguf.GGMLQuantizationType.F32:
        writer.add_tensor(name, value)
    else:
        writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
