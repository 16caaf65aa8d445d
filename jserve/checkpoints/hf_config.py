"""Reads a Hugging Face `config.json` into a `ModelSpec`; refuses features without a decoder.

Understands the key styles of transformers 4 (`rope_theta`, `rope_scaling`) and 5
(`rope_parameters`); defaults of absent keys are those of the transformers config classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jserve.core.errors import ConfigError
from jserve.core.model_spec import ModelSpec, RopeScaling, RopeScalingKind

Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Defaults:
    """The values that transformers assumes for a family when `config.json` does not say."""

    family: str
    activation: str = "silu"
    rope_theta: float = 10_000.0
    max_position: int = 2048
    kv_heads: int | None = None  # None: q_heads
    head_dim: int | None = None  # None: model_dim / q_heads
    tied_embeddings: bool = False
    sliding_window: int | None = None
    eos: int | None = None
    norm_eps: float = 1e-6
    experts: int = 0
    experts_per_token: int = 0


FAMILIES: dict[str, _Defaults] = {
    "llama": _Defaults("llama", eos=2),
    "mistral": _Defaults("mistral", max_position=131_072, kv_heads=8, sliding_window=4096, eos=2),
    "qwen2": _Defaults("qwen2", max_position=32_768, kv_heads=32, sliding_window=4096),
    "qwen3": _Defaults(
        "qwen3", max_position=32_768, kv_heads=32, head_dim=128, sliding_window=4096
    ),
    "gemma3_text": _Defaults(
        "gemma3",
        activation="gelu_pytorch_tanh",
        rope_theta=1_000_000.0,
        max_position=131_072,
        kv_heads=4,
        head_dim=256,
        tied_embeddings=True,
        sliding_window=4096,
        eos=1,
    ),
    "mixtral": _Defaults(
        "mixtral",
        rope_theta=1_000_000.0,
        max_position=131_072,
        kv_heads=8,
        eos=2,
        norm_eps=1e-5,
        experts=8,
        experts_per_token=2,
    ),
    "qwen3_moe": _Defaults(
        "qwen3_moe",
        max_position=32_768,
        kv_heads=4,
        sliding_window=4096,
        experts=128,
        experts_per_token=8,
    ),
}
GEMMA3_LOCAL_ROPE_THETA = 10_000.0
GEMMA3_WINDOW_PATTERN = 6  # every sixth layer is global
QWEN_MAX_WINDOW_LAYERS = 28
QWEN_EXPERT_FFN_DIM = 768
EXPERT_KEYS = ("num_experts", "num_local_experts")  # transformers 5 writes the second for both
UNSUPPORTED_IF_SET = (
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "use_bidirectional_attention",
    "quantization_config",
)
ROPE_KINDS = ("default", *(kind.value for kind in RopeScalingKind))


def spec_from_hf(config: Config) -> ModelSpec:
    """The spec of a `config.json`.

    Raises ConfigError naming the key when the model type, a rope kind or another feature is not
    supported, or a required key is absent or has the wrong type.
    """
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise ConfigError(
            f"config.json: model_type {model_type!r} is not supported; known: {sorted(FAMILIES)}"
        )
    defaults = FAMILIES[model_type]
    _refuse_unsupported(config, defaults)
    sizes = _sizes(config, defaults)
    local_layers, window = _windows(config, defaults, sizes["layers"])
    theta, scaling, local_theta = _rope(config, defaults, sizes["max_position"])
    attention_bias = model_type not in ("mistral", "mixtral") and bool(
        config.get("attention_bias", False)
    )
    return ModelSpec(
        family=defaults.family,
        **sizes,
        norm_eps=_number(config, "rms_norm_eps", defaults.norm_eps),
        rope_theta=theta,
        rope_scaling=scaling,
        local_rope_theta=local_theta,
        tied_embeddings=bool(config.get("tie_word_embeddings", defaults.tied_embeddings)),
        qkv_bias=defaults.family == "qwen2" or attention_bias,
        output_bias=defaults.family != "qwen2" and attention_bias,
        ffn_bias=defaults.family == "llama" and bool(config.get("mlp_bias", False)),
        sliding_window=window,
        local_layers=local_layers,
        query_scale=_query_scale(config, defaults),
        **_experts(config, defaults, sizes),
        eos_token_ids=eos_token_ids(config, defaults.eos),
    )


def eos_token_ids(config: Config, default: int | None = None) -> tuple[int, ...]:
    """All end-of-sequence ids of a `config.json` or `generation_config.json`, without repeats."""
    eos = config.get("eos_token_id", default)
    ids = [] if eos is None else [eos] if isinstance(eos, int) else eos
    if not isinstance(ids, list) or not all(type(i) is int and i >= 0 for i in ids):
        raise ConfigError(f"eos_token_id: expected token ids, got {eos!r}")
    return tuple(dict.fromkeys(ids))


def _sizes(config: Config, defaults: _Defaults) -> dict[str, int]:
    model_dim, q_heads = _integer(config, "hidden_size"), _integer(config, "num_attention_heads")
    kv_heads = _optional_integer(config, "num_key_value_heads", defaults.kv_heads)
    head_dim = _optional_integer(config, "head_dim", defaults.head_dim)
    if head_dim is None and model_dim % q_heads:
        raise ConfigError(
            f"config.json: hidden_size ({model_dim}) is not a multiple of "
            f"num_attention_heads ({q_heads}) and head_dim is not given"
        )
    return {
        "vocab": _integer(config, "vocab_size"),
        "layers": _integer(config, "num_hidden_layers"),
        "model_dim": model_dim,
        "ffn_dim": _integer(config, "intermediate_size"),
        "q_heads": q_heads,
        "kv_heads": kv_heads or q_heads,
        "head_dim": head_dim or model_dim // q_heads,
        "max_position": _integer(config, "max_position_embeddings", defaults.max_position),
    }


def _windows(config: Config, defaults: _Defaults, layers: int) -> tuple[tuple[bool, ...], int]:
    """A flag for each local layer (empty: all or none), and their window in tokens (0: none)."""
    window = _optional_integer(config, "sliding_window", defaults.sliding_window)
    if defaults.family == "llama":
        return (), 0
    if defaults.family.startswith("qwen") and not config.get("use_sliding_window", False):
        window = None
    if defaults.family in ("mistral", "mixtral", "qwen3_moe"):
        return (), window or 0
    local = _local_layers(config, defaults, layers, window)
    return (local, window or 0) if any(local) else ((), 0)


def _local_layers(
    config: Config, defaults: _Defaults, layers: int, window: int | None
) -> tuple[bool, ...]:
    kinds = config.get("layer_types")
    if kinds is not None:
        known = ("full_attention", "sliding_attention")
        if not isinstance(kinds, list) or any(kind not in known for kind in kinds):
            raise ConfigError(f"config.json: layer_types must be a list of {known}, got {kinds!r}")
        if len(kinds) != layers:
            raise ConfigError(
                f"config.json: layer_types has {len(kinds)} entries for {layers} layers"
            )
        return tuple(kind == "sliding_attention" for kind in kinds)
    if defaults.family == "gemma3":
        pattern = _integer(config, "sliding_window_pattern", GEMMA3_WINDOW_PATTERN)
        return tuple((layer + 1) % pattern != 0 for layer in range(layers))
    first_local = _integer(config, "max_window_layers", QWEN_MAX_WINDOW_LAYERS)
    return tuple(window is not None and layer >= first_local for layer in range(layers))


def _rope(
    config: Config, defaults: _Defaults, max_position: int
) -> tuple[float, RopeScaling | None, float | None]:
    """Theta and scaling of the global layers, theta of the local ones (None: the same)."""
    new, old = config.get("rope_parameters"), config.get("rope_scaling")
    theta = _number(config, "rope_theta", defaults.rope_theta)
    if defaults.family == "gemma3":
        return _gemma3_rope(config, theta, max_position)
    rope = _rope_dict("rope_scaling", old) or _rope_dict("rope_parameters", new)
    return _number(rope, "rope_theta", theta), _scaling(rope, config, max_position), None


def _gemma3_rope(
    config: Config, theta: float, max_position: int
) -> tuple[float, RopeScaling | None, float | None]:
    new = _rope_dict("rope_parameters", config.get("rope_parameters"))
    kinds = ("full_attention", "sliding_attention")
    if not set(new) <= set(kinds):
        raise ConfigError(f"config.json: rope_parameters of gemma3 must be keyed by {kinds}")
    name = "rope_parameters.full_attention"
    full = {**_rope_dict(name, new.get(kinds[0]))}
    full.update(_rope_dict("rope_scaling", config.get("rope_scaling")))
    local = _rope_dict("rope_parameters.sliding_attention", new.get(kinds[1]))
    if _scaling(local, config, max_position) is not None:
        raise ConfigError("config.json: rope scaling of local layers is not supported")
    local_theta = _number(config, "rope_local_base_freq", GEMMA3_LOCAL_ROPE_THETA)
    return (
        _number(full, "rope_theta", theta),
        _scaling(full, config, max_position),
        _number(local, "rope_theta", local_theta),
    )


def _scaling(rope: Config, config: Config, max_position: int) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_KINDS:
        raise ConfigError(
            f"config.json: rope type {kind!r} is not supported; supported: {list(ROPE_KINDS)}"
        )
    if _number(rope, "partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError("config.json: partial_rotary_factor is not supported")
    if kind == "default":
        return None
    factor = _number(rope, "factor")
    if kind == RopeScalingKind.LINEAR.value:
        return RopeScaling(RopeScalingKind.LINEAR, factor)
    if kind == RopeScalingKind.DYNAMIC.value:
        return RopeScaling(RopeScalingKind.DYNAMIC, factor, original_max_position=max_position)
    trained = _integer(rope, "original_max_position_embeddings", max_position)
    return RopeScaling(
        RopeScalingKind.LLAMA3,
        factor,
        low_freq_factor=_number(rope, "low_freq_factor"),
        high_freq_factor=_number(rope, "high_freq_factor"),
        original_max_position=_integer(config, "original_max_position_embeddings", trained),
    )


def _rope_dict(key: str, value: Any) -> Config:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"config.json: {key} must be an object, got {value!r}")
    return value


def _query_scale(config: Config, defaults: _Defaults) -> float | None:
    if defaults.family != "gemma3":
        return None
    return _number(config, "query_pre_attn_scalar", 256.0) ** -0.5


def _experts(config: Config, defaults: _Defaults, sizes: Mapping[str, int]) -> dict[str, Any]:
    """The fields of a spec that describe experts; none if no layer has any."""
    if not defaults.experts:
        return {}
    is_mixtral = defaults.family == "mixtral"
    key = next((key for key in EXPERT_KEYS if key in config), EXPERT_KEYS[is_mixtral])
    experts, layers = _integer(config, key, defaults.experts), sizes["layers"]
    if is_mixtral and experts < 1:
        raise ConfigError(f"config.json: {key} must be positive, got {experts}")
    sparse = (True,) * layers if is_mixtral else _sparse_layers(config, layers)
    if not experts or not any(sparse):
        return {}
    return {
        "experts": experts,
        "experts_per_token": _integer(config, "num_experts_per_tok", defaults.experts_per_token),
        "expert_ffn_dim": sizes["ffn_dim"]
        if is_mixtral
        else _integer(config, "moe_intermediate_size", QWEN_EXPERT_FFN_DIM),
        "weights_sum_to_one": is_mixtral or bool(config.get("norm_topk_prob", False)),
        "sparse_layers": () if all(sparse) else sparse,
    }


def _sparse_layers(config: Config, layers: int) -> tuple[bool, ...]:
    step = _integer(config, "decoder_sparse_step", 1)
    if step < 1:
        raise ConfigError(f"config.json: decoder_sparse_step must be positive, got {step}")
    dense = config.get("mlp_only_layers") or []
    if not isinstance(dense, list) or any(type(layer) is not int for layer in dense):
        raise ConfigError(f"config.json: mlp_only_layers must be a list of layers, got {dense!r}")
    return tuple((layer + 1) % step == 0 and layer not in dense for layer in range(layers))


def _refuse_unsupported(config: Config, defaults: _Defaults) -> None:
    key = "hidden_activation" if defaults.family == "gemma3" else "hidden_act"
    activation = config.get(key, defaults.activation)
    if activation not in (defaults.activation, "swish" if defaults.activation == "silu" else None):
        raise ConfigError(
            f"config.json: {key} {activation!r} is not supported for {defaults.family}, "
            f"only {defaults.activation!r}"
        )
    if _number(config, "partial_rotary_factor", 1.0) != 1.0:
        raise ConfigError("config.json: partial_rotary_factor is not supported")
    for key in UNSUPPORTED_IF_SET + (() if defaults.experts else EXPERT_KEYS):
        if config.get(key):
            raise ConfigError(f"config.json: {key} = {config[key]!r} is not supported")


def _integer(config: Config, key: str, default: int | None = None) -> int:
    value = _optional_integer(config, key, default)
    if value is None:
        raise ConfigError(f"config.json: {key} is missing")
    return value


def _optional_integer(config: Config, key: str, default: int | None) -> int | None:
    value = config.get(key, default)
    if value is not None and type(value) is not int:
        raise ConfigError(f"config.json: {key} must be an integer, got {value!r}")
    return value


def _number(config: Config, key: str, default: float | None = None) -> float:
    value = config.get(key, default)
    if value is None and default is not None:
        value = default
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        problem = "is missing" if value is None else f"must be a number, got {value!r}"
        raise ConfigError(f"config.json: {key} {problem}")
    return float(value)
