"""Writes a Hugging Face folder that transformers loads: config, safetensors, text side."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jserve.checkpoints.safetensors_folder import DTYPES, WHOLE
from jserve.checkpoints.temporary import temporary_folder
from jserve.checkpoints.tensor_source import Progress, TensorSource
from jserve.checkpoints.text_assets import CONFIG, TextAssets, save_text_assets
from jserve.core.errors import ConfigError
from jserve.core.model_spec import ModelSpec, RopeScaling, RopeScalingKind
from jserve.model.functional import Model
from jserve.model.loading.reading import (
    check_tensors,
    found_specs,
    read_param,
    reading_threads,
)
from jserve.model.params import ParamSpec

_CLASSES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "mistral": ("mistral", "MistralForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
    "mixtral": ("mixtral", "MixtralForCausalLM"),
    "qwen3_moe": ("qwen3_moe", "Qwen3MoeForCausalLM"),
}


def write_hf_folder(
    folder: Path, model: Model, source: TensorSource, assets: TextAssets, progress: Progress
) -> None:
    """Writes config.json, model.safetensors and the text side, all or nothing.

    Raises ConfigError if the tensors are not those of `model`, or `folder` exists.
    """
    if folder.exists():
        raise ConfigError(f"{folder}: exists already; choose another folder or delete it")
    specs = model.param_specs()
    check_tensors(source, found_specs(source, specs))
    folder.parent.mkdir(parents=True, exist_ok=True)
    config = hf_config_from_spec(model.spec) | {"torch_dtype": model.dtype.name}
    if assets.bos_token_id is not None:
        config["bos_token_id"] = assets.bos_token_id
    try:
        with temporary_folder(folder.parent, folder.name) as temporary:
            (temporary / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
            save_text_assets(temporary, assets)
            _write_safetensors(temporary / WHOLE, source, specs, progress)
            temporary.rename(folder)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written: {error}") from error


def hf_config_from_spec(spec: ModelSpec) -> dict[str, Any]:
    """The `config.json` of a spec; `spec_from_hf` gives the spec back.

    Raises ConfigError for biases, windows or experts that Hugging Face's classes do not have.
    """
    model_type, architecture = _CLASSES[spec.family]
    config: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": spec.vocab,
        "num_hidden_layers": spec.layers,
        "hidden_size": spec.model_dim,
        "intermediate_size": spec.ffn_dim,
        "num_attention_heads": spec.q_heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "max_position_embeddings": spec.max_position,
        "rms_norm_eps": spec.norm_eps,
        "rope_theta": spec.rope_theta,
        "tie_word_embeddings": spec.tied_embeddings,
        "eos_token_id": list(spec.eos_token_ids),
        **_biases(spec),
        **_windows(spec),
        **_experts(spec),
    }
    if spec.rope_scaling is not None:
        config["rope_scaling"] = _rope_scaling(spec.rope_scaling)
    if spec.family == "gemma3":
        # transformers wants an integer
        config["query_pre_attn_scalar"] = round(spec.attention_scale**-2)
        if spec.local_rope_theta is not None:
            config["rope_local_base_freq"] = spec.local_rope_theta
        config["hidden_activation"] = "gelu_pytorch_tanh"
    else:
        config["hidden_act"] = "silu"
    return config


def _biases(spec: ModelSpec) -> dict[str, bool]:
    if spec.family == "qwen2":
        return {}  # its q, k and v always have a bias, nothing else has
    if spec.qkv_bias != spec.output_bias or (spec.ffn_bias and spec.family != "llama"):
        raise ConfigError(
            f"{spec.family} with qkv_bias={spec.qkv_bias}, output_bias={spec.output_bias}, "
            f"ffn_bias={spec.ffn_bias} has no Hugging Face form"
        )
    biases = {"attention_bias": spec.qkv_bias}
    return biases | {"mlp_bias": spec.ffn_bias} if spec.family == "llama" else biases


def _windows(spec: ModelSpec) -> dict[str, Any]:
    if spec.family == "llama":
        return {}
    if spec.family in ("mistral", "mixtral"):
        return {"sliding_window": spec.sliding_window or None}
    if spec.family == "qwen3_moe":  # has one kind of layer only
        if spec.local_layers:
            raise ConfigError("qwen3_moe with local_layers has no Hugging Face form")
        window = spec.sliding_window or None
        return {"sliding_window": window, "use_sliding_window": window is not None}
    local = [spec.is_local(layer) for layer in range(spec.layers)]
    kinds = ["sliding_attention" if is_local else "full_attention" for is_local in local]
    config: dict[str, Any] = {"sliding_window": spec.sliding_window or None, "layer_types": kinds}
    if spec.family != "gemma3":
        config["use_sliding_window"] = any(local)
    return config


def _experts(spec: ModelSpec) -> dict[str, Any]:
    if spec.family == "mixtral":
        one_kind = not spec.sparse_layers and spec.expert_ffn_dim == spec.ffn_dim
        if not (spec.experts and one_kind and spec.weights_sum_to_one):
            raise ConfigError(
                "mixtral has a Hugging Face form only with experts of ffn_dim in every layer "
                "whose weights_sum_to_one"
            )
        return {
            "num_local_experts": spec.experts,
            "num_experts_per_tok": spec.experts_per_token,
        }
    if spec.family != "qwen3_moe":
        return {}
    if not spec.experts:
        return {"num_experts": 0}
    return {
        "num_experts": spec.experts,
        "num_experts_per_tok": spec.experts_per_token,
        "moe_intermediate_size": spec.expert_ffn_dim,
        "norm_topk_prob": spec.weights_sum_to_one,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i in range(spec.layers) if not spec.is_sparse(i)],
    }


def _rope_scaling(scaling: RopeScaling) -> dict[str, Any]:
    config: dict[str, Any] = {"rope_type": scaling.kind.value, "factor": scaling.factor}
    if scaling.kind is RopeScalingKind.LLAMA3:
        config["low_freq_factor"] = scaling.low_freq_factor
        config["high_freq_factor"] = scaling.high_freq_factor
        config["original_max_position_embeddings"] = scaling.original_max_position
    return config


def _write_safetensors(
    path: Path, source: TensorSource, specs: Mapping[str, ParamSpec], progress: Progress
) -> None:
    """Writes one file, with one tensor in host memory at a time."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in specs.values():
        dtype = np.dtype(jnp.dtype(spec.dtype))
        for name in spec.source:
            start, end = end, end + int(np.prod(spec.source_shape)) * dtype.itemsize
            header[name] = {
                "dtype": names[dtype],
                "shape": list(spec.source_shape),
                "data_offsets": [start, end],
            }
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file, reading_threads() as pool:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, spec in found_specs(source, specs).items():
            file.write(read_param(source, spec, pool).view(np.uint8).data)
            progress(header[specs[name].source[-1]]["data_offsets"][1], end)
