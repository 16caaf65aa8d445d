"""The tiny checkpoints: one case for every family, rotary scaling and way of storing weights."""

from dataclasses import dataclass, field
from typing import Any

VOCAB = 256
TOKENS = 48


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
    # The hub's form: the activation has another name, tied embeddings are the default.
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
MIXTRAL = _config(
    "MixtralForCausalLM",
    "mixtral",
    intermediate_size=24,
    rope_theta=1e6,
    sliding_window=None,
    num_local_experts=4,
    num_experts_per_tok=2,
)
QWEN3_MOE = _config(
    "Qwen3MoeForCausalLM",
    "qwen3_moe",
    head_dim=16,
    rope_theta=1e6,
    rms_norm_eps=1e-6,
    attention_bias=False,
    sliding_window=None,
    use_sliding_window=False,
    num_experts=8,
    num_experts_per_tok=3,
    moe_intermediate_size=12,
    norm_topk_prob=True,
    decoder_sparse_step=1,
    mlp_only_layers=[],
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
        "mixtral",
        MIXTRAL,
        ablations=({"num_experts_per_tok": 1}, {"num_experts_per_tok": 4}, {"rope_theta": 1e4}),
    ),
    Case(
        "qwen3_moe",
        QWEN3_MOE,
        ablations=({"num_experts_per_tok": 2}, {"norm_topk_prob": False}),
    ),
    Case(
        "qwen3_moe_dense_layers",  # one of four has experts; a window in all
        QWEN3_MOE
        | {
            "num_hidden_layers": 4,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [1],
            "norm_topk_prob": False,
            "use_sliding_window": True,
            "sliding_window": 8,
        },
        ablations=(
            {"norm_topk_prob": True},
            {"use_sliding_window": False},
            {"sliding_window": 9},
        ),
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
        "gemma3_linear",  # global layers are scaled from 4B on; the config form of transformers 5
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
