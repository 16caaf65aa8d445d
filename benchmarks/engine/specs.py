"""Models that are measured with random weights: shapes by name, each with an engine that suits it.

Weights do not change how long a step takes, so no file is needed. No JAX.
"""

from jserve.checkpoints.config import Dtype, ModelConfig, RandomWeights
from jserve.config import ServeConfig
from jserve.core.errors import ConfigError
from jserve.core.model_spec import ModelSpec, RopeScaling, RopeScalingKind
from jserve.engine.config import EngineConfig

_CPU = EngineConfig(num_slots=32, decode_rows=(32,), max_model_len=8192, kv_bytes=1 << 30)
_GPU = EngineConfig(
    num_slots=128,
    max_model_len=16384,
    page_size=64,
    kv_bytes=None,
    mixed_tokens=(256, 2048),
    decode_rows=(8, 128),
)

MODELS: dict[str, tuple[ModelSpec, EngineConfig]] = {
    # Little for a device to do: what is left is the host's time.
    "tiny": (
        ModelSpec(
            family="llama",
            vocab=512,
            layers=2,
            model_dim=64,
            ffn_dim=128,
            q_heads=4,
            kv_heads=2,
            head_dim=16,
            max_position=2048,
            norm_eps=1e-5,
            rope_theta=10000.0,
            tied_embeddings=True,
        ),
        EngineConfig(num_slots=32, decode_rows=(32,), kv_bytes=256 << 20),
    ),
    "smollm2-135m": (
        ModelSpec(
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
            rope_theta=100000.0,
            tied_embeddings=True,
            eos_token_ids=(2,),
        ),
        _CPU,
    ),
    "gemma3-270m": (
        ModelSpec(
            family="gemma3",
            vocab=262144,
            layers=18,
            model_dim=640,
            ffn_dim=2048,
            q_heads=4,
            kv_heads=1,
            head_dim=256,
            max_position=32768,
            norm_eps=1e-6,
            rope_theta=1e6,
            tied_embeddings=True,
            sliding_window=512,
            local_layers=tuple(layer % 6 != 5 for layer in range(18)),
            local_rope_theta=10000.0,
            query_scale=256**-0.5,
            eos_token_ids=(1, 106),
        ),
        _CPU,
    ),
    "qwen3-8b": (
        ModelSpec(
            family="qwen3",
            vocab=151936,
            layers=36,
            model_dim=4096,
            ffn_dim=12288,
            q_heads=32,
            kv_heads=8,
            head_dim=128,
            max_position=40960,
            norm_eps=1e-6,
            rope_theta=1e6,
            eos_token_ids=(151645, 151643),
        ),
        _GPU,
    ),
    "llama-3.1-8b": (
        ModelSpec(
            family="llama",
            vocab=128256,
            layers=32,
            model_dim=4096,
            ffn_dim=14336,
            q_heads=32,
            kv_heads=8,
            head_dim=128,
            max_position=131072,
            norm_eps=1e-5,
            rope_theta=500000.0,
            rope_scaling=RopeScaling(
                RopeScalingKind.LLAMA3,
                factor=8.0,
                low_freq_factor=1.0,
                high_freq_factor=4.0,
                original_max_position=8192,
            ),
            eos_token_ids=(128001, 128008, 128009),
        ),
        _GPU,
    ),
}


def serve_config(name: str, dtype: str) -> ServeConfig:
    """A config like those of `configs/`; `--set` changes it. Raises ConfigError."""
    if name not in MODELS:
        raise ConfigError(f"--model {name!r} is not known; one of {list(MODELS)}")
    spec, engine = MODELS[name]
    model = ModelConfig(name=name, source=RandomWeights(spec=spec), dtype=Dtype(dtype))
    return ServeConfig(model=model, engine=engine)
