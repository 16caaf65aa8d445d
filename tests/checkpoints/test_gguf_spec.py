"""The spec that GGUF metadata describes, and metadata that is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jserve.checkpoints.gguf_file import GgufFile
from jserve.checkpoints.gguf_spec import llama3_factors, llama3_scaling, spec_from_gguf
from jserve.core.errors import ConfigError
from jserve.core.model_spec import ModelSpec, RopeScaling, RopeScalingKind
from tests.model_files import gguf_metadata, tiny_weights, write_gguf

COMMON: dict[str, Any] = {
    "vocab": 320,
    "layers": 2,
    "model_dim": 64,
    "ffn_dim": 96,
    "q_heads": 4,
    "kv_heads": 2,
    "head_dim": 16,
    "max_position": 128,
    "norm_eps": 1e-5,
    "rope_theta": 5000.0,
    "eos_token_ids": (264, 262),  # <|im_end|>, which metadata names, and <|endoftext|>
}
EXPERTS: dict[str, Any] = {"experts": 3, "experts_per_token": 2, "weights_sum_to_one": True}
EXPECTED = {
    "llama": ModelSpec(family="llama", tied_embeddings=True, **COMMON),
    "qwen2": ModelSpec(family="qwen2", tied_embeddings=True, qkv_bias=True, **COMMON),
    "qwen3": ModelSpec(family="qwen3", tied_embeddings=True, **COMMON),
    "gemma3": ModelSpec(
        family="gemma3",
        tied_embeddings=True,
        sliding_window=8,
        local_layers=(True, True),
        local_rope_theta=10_000.0,
        query_scale=0.25,
        **COMMON,
    ),
    "mixtral": ModelSpec(
        family="mixtral", tied_embeddings=True, expert_ffn_dim=96, **EXPERTS, **COMMON
    ),
    "qwen3moe": ModelSpec(
        family="qwen3_moe", tied_embeddings=True, expert_ffn_dim=32, **EXPERTS, **COMMON
    ),
}


def spec_of(
    tmp_path: Path,
    arch: str,
    change: dict[str, Any] | None = None,
    *,
    tied: bool = True,
    extra: dict[str, np.ndarray] | None = None,
) -> ModelSpec:
    metadata = gguf_metadata(arch) | (change or {})
    metadata = {key: value for key, value in metadata.items() if value is not None}
    weights = tiny_weights(arch, tied=tied)
    path = tmp_path / "model.gguf"
    path.unlink(missing_ok=True)
    return spec_from_gguf(GgufFile(write_gguf(path, arch, weights, metadata=metadata, extra=extra)))


@pytest.mark.parametrize("arch", EXPECTED)
def test_each_family(arch: str, tmp_path: Path) -> None:
    assert spec_of(tmp_path, arch) == EXPECTED[arch]
    assert not spec_of(tmp_path, arch, tied=False).tied_embeddings


def test_defaults_of_absent_keys_are_llama_cpps(tmp_path: Path) -> None:
    absent = ("attention.key_length", "attention.value_length", "rope.freq_base")
    change = {f"llama.{key}": None for key in (*absent, "attention.head_count_kv")}
    spec = spec_of(tmp_path, "llama", change)
    assert (spec.head_dim, spec.kv_heads, spec.rope_theta) == (16, 4, 10_000.0)


def test_windows(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, "llama", {"llama.attention.sliding_window": 16})
    assert (spec.family, spec.sliding_window, spec.local_layers) == ("mistral", 16, ())
    key = "gemma3.attention.sliding_window_pattern"
    assert spec_of(tmp_path, "gemma3", {key: 2}).local_layers == (True, False)
    assert spec_of(tmp_path, "gemma3", {key: [False, True]}).local_layers == (False, True)


def test_linear_scaling(tmp_path: Path) -> None:
    change = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    linear = RopeScaling(RopeScalingKind.LINEAR, 4.0)
    assert spec_of(tmp_path, "llama", change).rope_scaling == linear
    assert spec_of(tmp_path, "llama", {"llama.rope.scale_linear": 4.0}).rope_scaling == linear
    assert spec_of(tmp_path, "llama", {"llama.rope.scaling.type": "none"}).rope_scaling is None


def transformers_factors(theta: float, dim: int, factor: float, high: float, old: int) -> Any:
    """Divisors of the frequencies, by transformers' `_compute_llama3_parameters` in a loop."""
    factors: list[float] = []
    for pair in range(dim // 2):
        freq = 1.0 / theta ** (2 * pair / dim)
        wavelen = 2 * np.pi / freq
        if wavelen < old / high:
            factors.append(1.0)
        elif wavelen > old:
            factors.append(factor)
        else:
            smooth = (old / wavelen - 1.0) / (high - 1.0)
            factors.append(1.0 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


@pytest.mark.parametrize(
    ("dim", "factor", "high", "old"),
    [(128, 8.0, 4.0, 8192), (64, 32.0, 4.0, 8192), (16, 8.0, 4.0, 8192), (128, 8.0, 3.0, 4096)],
)
def test_llama3_scaling_is_found_again_from_its_factors(
    dim: int, factor: float, high: float, old: int
) -> None:
    factors = transformers_factors(500_000.0, dim, factor, high, old)
    found = llama3_scaling(factors, 500_000.0)
    assert found == RopeScaling(
        RopeScalingKind.LLAMA3, factor, 1.0, high, original_max_position=old
    )
    np.testing.assert_allclose(llama3_factors(found, 500_000.0, dim // 2), factors, rtol=1e-5)


def test_rope_freqs_of_a_file(tmp_path: Path) -> None:
    change = {"llama.rope.freq_base": 500_000.0}
    factors = transformers_factors(500_000.0, 16, 8.0, 4.0, 8192)
    spec = spec_of(tmp_path, "llama", change, extra={"rope_freqs.weight": factors})
    assert spec.rope_scaling == RopeScaling(
        RopeScalingKind.LLAMA3, 8.0, 1.0, 4.0, original_max_position=8192
    )
    ones = {"rope_freqs.weight": np.ones(8, np.float32)}
    assert spec_of(tmp_path, "llama", change, extra=ones).rope_scaling is None
    odd = {"rope_freqs.weight": np.linspace(1, 9, 8, dtype=np.float32) ** 2}
    with pytest.raises(ConfigError, match="not a llama3 rope scaling"):
        spec_of(tmp_path, "llama", change, extra=odd)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"llama.rope.scaling.type": "yarn"}, "rope scaling 'yarn' is not supported"),
        ({"llama.expert_count": 8}, "expert_used_count must be an integer, got None"),
        (
            {"llama.expert_count": 8, "llama.expert_used_count": 9},
            r"experts_per_token must be between 1 and experts \(8\), got 9",
        ),
        ({"llama.expert_shared_count": 1}, "expert_shared_count = 1 is not supported"),
        ({"llama.attention.value_length": 32}, "attention.value_length differs"),
        ({"llama.rope.dimension_count": 8}, "rope.dimension_count differs"),
        ({"llama.block_count": None}, "block_count must be an integer, got None"),
        ({"llama.context_length": "long"}, "context_length must be an integer, got 'long'"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "epsilon must be a number"),
        ({"llama.attention.head_count_kv": [2, 1]}, "head_count_kv must be an integer"),
    ],
)
def test_what_is_not_supported_or_missing_is_named(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        spec_of(tmp_path, "llama", change)


def test_experts_of_another_architecture_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"qwen2\.expert_count = 8 is not supported"):
        spec_of(tmp_path, "qwen2", {"qwen2.expert_count": 8})


def test_an_unknown_architecture_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "falcon", tiny_weights("llama"), metadata={})
    with pytest.raises(ConfigError, match=r"m\.gguf: architecture 'falcon' is not supported"):
        spec_from_gguf(GgufFile(path))
