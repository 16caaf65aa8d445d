"""ModelSpec, its file in a native folder, and `config.json` of both transformers styles."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from jserve.checkpoints.hf_config import eos_token_ids, spec_from_hf
from jserve.checkpoints.native_folder import read_spec, write_spec
from jserve.core.errors import ConfigError
from jserve.core.model_spec import (
    ModelSpec,
    RopeScaling,
    RopeScalingKind,
)

# Excerpts of published config.json files.
SMOLLM2_135M = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-05,
    "rope_theta": 100000,
    "rope_scaling": None,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "attention_bias": False,
    "eos_token_id": 2,
}
LLAMA31_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "hidden_act": "silu",
    "eos_token_id": [128001, 128008, 128009],
}
GEMMA3_270M = {
    "model_type": "gemma3_text",
    "vocab_size": 262144,
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": None,
    "query_pre_attn_scalar": 256,
    "sliding_window": 512,
    "_sliding_window_pattern": 6,
    "hidden_activation": "gelu_pytorch_tanh",
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "use_bidirectional_attention": False,
    "eos_token_id": 1,
}
QWEN25_7B = {
    "model_type": "qwen2",
    "vocab_size": 152064,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "use_sliding_window": False,
    "max_window_layers": 28,
    "hidden_act": "silu",
    "eos_token_id": 151645,
}
MISTRAL_7B_V01 = {
    "model_type": "mistral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "hidden_act": "silu",
    "eos_token_id": 2,
}
MIXTRAL_8X7B = {
    "model_type": "mixtral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "hidden_act": "silu",
    "output_router_logits": False,
    "eos_token_id": 2,
}
QWEN3_30B_A3B = {
    "model_type": "qwen3_moe",
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "rope_scaling": None,
    "sliding_window": None,
    "use_sliding_window": False,
    "hidden_act": "silu",
    "eos_token_id": 151645,
}
PUBLISHED = [
    SMOLLM2_135M,
    LLAMA31_8B,
    GEMMA3_270M,
    QWEN25_7B,
    MISTRAL_7B_V01,
    MIXTRAL_8X7B,
    QWEN3_30B_A3B,
]


@pytest.mark.parametrize("config", PUBLISHED, ids=lambda config: str(config["model_type"]))
def test_spec_survives_its_file(config: dict[str, Any], tmp_path: Path) -> None:
    spec = spec_from_hf(config)
    write_spec(tmp_path, spec)
    assert read_spec(tmp_path) == spec
    assert hash(spec) == hash(spec_from_hf(dict(config)))


def test_smollm2() -> None:
    spec = spec_from_hf(SMOLLM2_135M)
    assert spec == ModelSpec(
        family="llama",
        vocab=49152,
        layers=30,
        model_dim=576,
        ffn_dim=1536,
        q_heads=9,
        kv_heads=3,
        head_dim=64,
        max_position=8192,
        norm_eps=1e-5,
        rope_theta=100_000.0,
        tied_embeddings=True,
        eos_token_ids=(2,),
    )
    assert spec.attention_scale == 0.125
    assert not any(spec.window_of(layer) for layer in range(30))


def test_llama31_scales_rope_and_has_three_ends() -> None:
    spec = spec_from_hf(LLAMA31_8B)
    assert spec.rope_scaling == RopeScaling(RopeScalingKind.LLAMA3, 8.0, 1.0, 4.0, 8192)
    assert spec.eos_token_ids == (128001, 128008, 128009)
    assert not spec.tied_embeddings


def test_gemma3_has_one_global_layer_in_six() -> None:
    spec = spec_from_hf(GEMMA3_270M)
    assert [spec.window_of(layer) for layer in range(7)] == [512] * 5 + [0, 512]
    assert (spec.rope_theta, spec.local_rope_theta) == (1e6, 1e4)
    assert spec.tied_embeddings  # the class default: the file does not say
    assert spec.query_scale == 1 / 16


def test_mistral_windows_every_layer_unless_null() -> None:
    spec = spec_from_hf(MISTRAL_7B_V01)
    assert {spec.window_of(layer) for layer in range(32)} == {4096}
    assert spec_from_hf(MISTRAL_7B_V01 | {"sliding_window": None}).window_of(0) == 0


def test_qwen_windows_only_when_told_and_only_late_layers() -> None:
    assert spec_from_hf(QWEN25_7B).sliding_window == 0
    spec = spec_from_hf(QWEN25_7B | {"use_sliding_window": True, "max_window_layers": 20})
    assert [spec.window_of(layer) for layer in (0, 19, 20, 27)] == [0, 0, 131072, 131072]
    kinds = ["sliding_attention", "full_attention"] * 14
    spec = spec_from_hf(QWEN25_7B | {"use_sliding_window": True, "layer_types": kinds})
    assert [spec.window_of(layer) for layer in (0, 1)] == [131072, 0]


def test_mixtral_has_experts_in_every_layer() -> None:
    spec = spec_from_hf(MIXTRAL_8X7B)
    assert (spec.experts, spec.experts_per_token, spec.expert_ffn_dim) == (8, 2, 14336)
    assert spec.weights_sum_to_one
    assert all(spec.is_sparse(layer) for layer in range(32))
    assert not spec.sliding_window


def test_qwen3_moe_has_experts_where_it_says() -> None:
    spec = spec_from_hf(QWEN3_30B_A3B)
    assert (spec.experts, spec.experts_per_token, spec.expert_ffn_dim) == (128, 8, 768)
    assert spec.weights_sum_to_one
    assert spec.sparse_layers == ()
    assert all(spec.is_sparse(layer) for layer in range(48))
    change = {"decoder_sparse_step": 2, "mlp_only_layers": [3, 9], "norm_topk_prob": False}
    spec = spec_from_hf(QWEN3_30B_A3B | change)
    assert [layer for layer in range(12) if spec.is_sparse(layer)] == [1, 5, 7, 11]
    assert not spec.weights_sum_to_one
    # transformers 5 writes the key of Mixtral.
    renamed = {k: v for k, v in QWEN3_30B_A3B.items() if k != "num_experts"}
    assert spec_from_hf(renamed | {"num_local_experts": 128}) == spec_from_hf(QWEN3_30B_A3B)
    assert not any(map(spec_from_hf(QWEN3_30B_A3B | {"num_experts": 0}).is_sparse, range(48)))


def test_biases_of_each_family() -> None:
    def biases(config: dict[str, Any]) -> tuple[bool, bool, bool]:
        spec = spec_from_hf(config)
        return spec.qkv_bias, spec.output_bias, spec.ffn_bias

    assert biases(SMOLLM2_135M) == (False, False, False)
    assert biases(SMOLLM2_135M | {"attention_bias": True}) == (True, True, False)
    assert biases(SMOLLM2_135M | {"mlp_bias": True}) == (False, False, True)
    assert biases(QWEN25_7B) == (True, False, False)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 4.0},
        {"rope_type": "default"},
    ],
    ids=str,
)
def test_both_styles_of_rope_keys_agree(scaling: dict[str, Any]) -> None:
    old = spec_from_hf(SMOLLM2_135M | {"rope_scaling": scaling})
    new = {k: v for k, v in SMOLLM2_135M.items() if not k.startswith("rope")}
    new["rope_parameters"] = scaling | {"rope_theta": 100000}
    assert spec_from_hf(new) == old


def test_both_styles_of_gemma3_rope_keys_agree() -> None:
    scaling = {"rope_type": "linear", "factor": 8.0}
    old = spec_from_hf(GEMMA3_270M | {"rope_scaling": scaling})
    new = {k: v for k, v in GEMMA3_270M.items() if not k.startswith("rope")}
    new["rope_parameters"] = {
        "full_attention": scaling | {"rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    assert spec_from_hf(new) == old
    assert old.rope_scaling == RopeScaling(RopeScalingKind.LINEAR, 8.0)


def test_dynamic_scaling_reaches_beyond_the_trained_context() -> None:
    spec = spec_from_hf(SMOLLM2_135M | {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}})
    assert (spec.max_position, spec.max_context) == (8192, 32768)
    assert spec_from_hf(LLAMA31_8B).max_context == 131072


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (SMOLLM2_135M, {"model_type": "olmoe"}, "model_type 'olmoe' is not supported"),
        (SMOLLM2_135M, {"num_local_experts": 8}, "num_local_experts = 8 is not supported"),
        (MIXTRAL_8X7B, {"num_experts_per_tok": 9}, r"between 1 and experts \(8\), got 9"),
        (MIXTRAL_8X7B, {"num_experts_per_tok": 0}, r"between 1 and experts \(8\), got 0"),
        (MIXTRAL_8X7B, {"num_local_experts": 0}, "num_local_experts must be positive, got 0"),
        (MIXTRAL_8X7B, {"num_local_experts": "8"}, "num_local_experts must be an integer"),
        (QWEN3_30B_A3B, {"num_experts": -1}, "experts must not be negative, got -1"),
        (QWEN3_30B_A3B, {"moe_intermediate_size": 0}, "expert_ffn_dim must be positive, got 0"),
        (QWEN3_30B_A3B, {"decoder_sparse_step": 0}, "decoder_sparse_step must be positive"),
        (QWEN3_30B_A3B, {"mlp_only_layers": [1.5]}, "mlp_only_layers must be a list"),
        (SMOLLM2_135M, {"model_type": None}, "model_type None"),
        (SMOLLM2_135M, {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "'yarn'"),
        (SMOLLM2_135M, {"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
        (SMOLLM2_135M, {"rope_scaling": 3}, "rope_scaling must be an object"),
        (SMOLLM2_135M, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (SMOLLM2_135M, {"hidden_act": "relu"}, "hidden_act 'relu'"),
        (SMOLLM2_135M, {"hidden_size": "576"}, "hidden_size must be an integer"),
        (SMOLLM2_135M, {"hidden_size": 575}, "not a multiple"),
        (SMOLLM2_135M, {"num_key_value_heads": 2}, "multiple of kv_heads"),
        (SMOLLM2_135M, {"num_hidden_layers": 0}, "layers must be positive"),
        (SMOLLM2_135M, {"eos_token_id": "</s>"}, "eos_token_id"),
        (SMOLLM2_135M, {"quantization_config": {"bits": 4}}, "quantization_config"),
        (LLAMA31_8B, {"rope_scaling": {"rope_type": "llama3", "factor": 8}}, "low_freq_factor"),
        (GEMMA3_270M, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping"),
        (GEMMA3_270M, {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        (GEMMA3_270M, {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (GEMMA3_270M, {"rope_parameters": {"rope_type": "default"}}, "must be keyed by"),
        (GEMMA3_270M, {"layer_types": ["chunked_attention"] * 18}, "layer_types must be"),
        (GEMMA3_270M, {"layer_types": ["full_attention"]}, "1 entries for 18 layers"),
        (GEMMA3_270M, {"sliding_window": None}, "sliding_window"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(
    config: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        spec_from_hf(config | change)


@pytest.mark.parametrize("key", ["vocab_size", "hidden_size", "num_hidden_layers"])
def test_a_missing_size_is_named(key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} is missing"):
        spec_from_hf({k: v for k, v in SMOLLM2_135M.items() if k != key})


@pytest.mark.parametrize(
    ("eos", "expected"), [(None, ()), (7, (7,)), ([7, 8, 7], (7, 8)), (0, (0,))]
)
def test_eos_token_ids(eos: Any, expected: tuple[int, ...]) -> None:
    assert eos_token_ids({"eos_token_id": eos}) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 63}, "even"),
        ({"experts_per_token": 2}, "sizes of experts but experts is 0"),
        ({"experts": 4, "experts_per_token": 5, "expert_ffn_dim": 8}, "between 1 and experts"),
        ({"experts": 4, "experts_per_token": 4}, "expert_ffn_dim must be positive"),
        (
            {
                "experts": 4,
                "experts_per_token": 4,
                "expert_ffn_dim": 8,
                "sparse_layers": (True,),
            },
            "sparse_layers has 1 entries for 30 layers",
        ),
    ],
)
def test_a_spec_that_makes_no_model_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(spec_from_hf(SMOLLM2_135M), **change)
