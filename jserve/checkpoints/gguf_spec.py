"""The `ModelSpec` that a GGUF file's metadata and tensors describe. No JAX."""

from typing import Any

import numpy as np

from jserve.checkpoints.gguf_file import EXPERT_NAMES, ROPE_FREQS, GgufFile
from jserve.checkpoints.gguf_header import GgufHeader
from jserve.checkpoints.gguf_tokenizer import end_token_ids
from jserve.core.errors import ConfigError
from jserve.core.model_spec import ModelSpec, RopeScaling, RopeScalingKind

FAMILIES = ("llama", "qwen2", "qwen3", "gemma3", "qwen3moe")
# Defaults of llama.cpp (llama-hparams.h, llama-model.cpp).
DEFAULT_ROPE_THETA = 10_000.0
GEMMA3_LOCAL_ROPE_THETA = 10_000.0
GEMMA3_WINDOW_PATTERN = 6
GEMMA3_27B_LAYERS = 62  # the only size whose queries are not scaled by head_dim
LLAMA3_ORIGINAL_POSITIONS = 8192  # assumed by llama.cpp's converter when it makes rope_freqs
_UNSUPPORTED = (
    "expert_shared_count",
    "expert_weights_scale",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "logit_scale",
    "residual_scale",
    "embedding_scale",
    "attention.scale",
    "attention.clamp_kqv",
)


def spec_from_gguf(file: GgufFile) -> ModelSpec:
    """The spec of a GGUF file.

    Raises ConfigError naming the file and the key when the architecture, a rope scaling or
    another feature is not supported, or a required key is absent or of the wrong type.
    """
    keys = _Keys(file.header)
    if file.arch not in FAMILIES:
        raise keys.error(f"architecture {file.arch!r} is not supported; known: {list(FAMILIES)}")
    for key in _UNSUPPORTED:
        if keys.get(key):
            raise keys.error(f"{file.arch}.{key} = {keys.get(key)} is not supported")
    if file.arch not in EXPERT_NAMES and keys.get("expert_count"):
        raise keys.error(f"{file.arch}.expert_count = {keys.get('expert_count')} is not supported")
    stored = file.tensors()
    layers, q_heads = keys.integer("block_count"), keys.integer("attention.head_count")
    model_dim = keys.integer("embedding_length")
    head_dim = keys.integer("attention.key_length", model_dim // max(q_heads, 1))
    for key in ("attention.value_length", "rope.dimension_count"):
        if keys.integer(key, head_dim) != head_dim:
            raise keys.error(f"{file.arch}.{key} differs from the head dimension {head_dim}")
    if "model.embed_tokens.weight" not in stored:
        raise keys.error("tensor token_embd.weight is missing")
    window, local_layers = _windows(keys, layers)
    theta = keys.number("rope.freq_base", DEFAULT_ROPE_THETA)
    experts = _experts(keys)
    bias = "model.layers.0.self_attn.q_proj.bias" in stored
    return ModelSpec(
        family=_family(file.arch, window, bool(experts)),
        vocab=stored["model.embed_tokens.weight"].shape[0],
        layers=layers,
        model_dim=model_dim,
        # The key is absent where every layer has experts.
        ffn_dim=keys.integer("feed_forward_length", experts.get("expert_ffn_dim")),
        q_heads=q_heads,
        kv_heads=keys.integer("attention.head_count_kv", q_heads),
        head_dim=head_dim,
        max_position=keys.integer("context_length"),
        norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
        rope_theta=theta,
        rope_scaling=_rope_scaling(file, keys, theta, head_dim),
        tied_embeddings="lm_head.weight" not in stored,
        qkv_bias=bias,
        output_bias="model.layers.0.self_attn.o_proj.bias" in stored,
        ffn_bias="model.layers.0.mlp.up_proj.bias" in stored,
        sliding_window=window,
        local_layers=local_layers,
        local_rope_theta=(
            keys.number("rope.freq_base_swa", GEMMA3_LOCAL_ROPE_THETA)
            if file.arch == "gemma3"
            else None
        ),
        query_scale=_query_scale(file.arch, layers, model_dim, q_heads, head_dim),
        **experts,
        eos_token_ids=end_token_ids(file.header),
    )


class _Keys:
    """Typed access to the architecture's own keys."""

    def __init__(self, header: GgufHeader) -> None:
        self._header = header
        self.arch = header.metadata.get("general.architecture")

    def get(self, key: str) -> Any:
        return self._header.metadata.get(f"{self.arch}.{key}")

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.get(key)
        if isinstance(value, np.ndarray) and value.size and (value == value[0]).all():
            value = value[0].item()  # one entry per layer
        value = default if value is None else value
        if type(value) is not int:
            raise self.error(f"{self.arch}.{key} must be an integer, got {value!r}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key)
        value = default if value is None else value
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise self.error(f"{self.arch}.{key} must be a number, got {value!r}")
        return _shortest_float(value)

    def error(self, problem: str) -> ConfigError:
        return ConfigError(f"{self._header.path}: {problem}")


def _shortest_float(value: float) -> float:
    """The shortest decimal of a float32: 1e-5 is stored as 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _windows(keys: _Keys, layers: int) -> tuple[int, tuple[bool, ...]]:
    """The sliding window in tokens (0: none), and a flag for each layer with it (empty: all)."""
    window = keys.integer("attention.sliding_window", 0)
    pattern = keys.get("attention.sliding_window_pattern")
    if not window:
        return 0, ()
    if isinstance(pattern, np.ndarray):
        return window, tuple(bool(local) for local in pattern[:layers])
    if pattern is None and keys.arch != "gemma3":
        return window, ()
    every = keys.integer("attention.sliding_window_pattern", GEMMA3_WINDOW_PATTERN)
    return window, tuple((layer + 1) % every != 0 for layer in range(layers))


def _family(arch: str, window: int, sparse: bool) -> str:
    if arch == "llama":
        return "mixtral" if sparse else "mistral" if window else "llama"
    return "qwen3_moe" if arch == "qwen3moe" else arch


def _experts(keys: _Keys) -> dict[str, Any]:
    """The fields of a spec that describe experts; none if there are no experts."""
    experts = keys.integer("expert_count", 0)
    if not experts:
        return {}
    return {
        "experts": experts,
        "experts_per_token": keys.integer("expert_used_count"),
        "expert_ffn_dim": (
            keys.integer("expert_feed_forward_length")
            if keys.arch == "qwen3moe"
            else keys.integer("feed_forward_length")
        ),
        "weights_sum_to_one": True,  # always, in llama.cpp's graphs of these architectures
    }


def _query_scale(
    arch: str, layers: int, model_dim: int, q_heads: int, head_dim: int
) -> float | None:
    if arch != "gemma3":
        return None
    return (model_dim // q_heads if layers == GEMMA3_27B_LAYERS else head_dim) ** -0.5


def _rope_scaling(file: GgufFile, keys: _Keys, theta: float, head_dim: int) -> RopeScaling | None:
    kind = keys.get("rope.scaling.type")
    if ROPE_FREQS in file.header.tensors:
        if kind not in (None, "none"):
            raise keys.error(f"rope_freqs.weight together with rope scaling {kind!r}")
        factors = file.read_stored(ROPE_FREQS)
        if factors.shape != (head_dim // 2,):
            raise keys.error(f"rope_freqs.weight has shape {factors.shape}, not {head_dim // 2}")
        scaling = llama3_scaling(factors, theta)
        if scaling is None:
            raise keys.error("rope_freqs.weight is not a llama3 rope scaling: not supported")
        return scaling if scaling.factor != 1.0 else None
    if kind in (None, "none"):
        factor = keys.number("rope.scale_linear", 1.0)  # files of before 2023-09
        return RopeScaling(RopeScalingKind.LINEAR, factor) if factor != 1.0 else None
    if kind != "linear":
        raise keys.error(f"rope scaling {kind!r} is not supported, only linear and llama3")
    return RopeScaling(RopeScalingKind.LINEAR, keys.number("rope.scaling.factor"))


def llama3_scaling(factors: np.ndarray, theta: float) -> RopeScaling | None:
    """The llama3 scaling that divides frequencies by these factors, if there is one.

    A file keeps only the factors. Between the two bounds, 1 / factor is linear in the frequency,
    which gives the bounds up to a common scale; it is fixed by low_freq_factor = 1, as in every
    released model. All factors must then come out again.
    """
    largest = round(float(factors.max()), 4)
    if np.all(factors == 1.0):
        return RopeScaling(RopeScalingKind.LLAMA3, 1.0)
    usual = RopeScaling(
        RopeScalingKind.LLAMA3, largest, 1.0, 4.0, original_max_position=LLAMA3_ORIGINAL_POSITIONS
    )
    if np.allclose(llama3_factors(usual, theta, factors.size), factors, rtol=1e-4):
        return usual
    # Frequency f is in radians per position: it turns original_positions * f / 2π times.
    freqs = theta ** -(np.arange(factors.size) / factors.size)
    middle = (factors > 1.0) & (factors < largest)
    if middle.sum() < 2:
        return None
    smooth = (1.0 / factors[middle] - 1.0 / largest) / (1.0 - 1.0 / largest)
    slope, offset = np.polyfit(freqs[middle] / (2 * np.pi), smooth, 1)
    span = -1.0 / offset  # high - low, in units of low
    found = RopeScaling(
        RopeScalingKind.LLAMA3,
        largest,
        1.0,
        round(float(1.0 + span), 3),
        original_max_position=round(float(slope * span)),
    )
    fits = np.allclose(llama3_factors(found, theta, factors.size), factors, rtol=1e-3)
    return found if fits else None


def llama3_factors(scaling: RopeScaling, theta: float, count: int) -> np.ndarray:
    """The divisor of each of `count` frequencies (transformers, modeling_rope_utils)."""
    wavelengths = 2 * np.pi * theta ** (np.arange(count) / count)
    turns = scaling.original_max_position / wavelengths
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return 1.0 / ((1.0 - smooth) / scaling.factor + smooth)
