"""Llama 3.1 8B Instruct in bfloat16, from a Hugging Face folder: `llama31_8b.py[:h200|:v5e-8]`.

Set model.source to the folder that the weights were downloaded to.
"""

from jserve.checkpoints.config import Dtype, ModelConfig
from jserve.config import ServeConfig
from jserve.core.errors import ConfigError
from jserve.engine.config import EngineConfig, Platform, PlatformConfig


def get_config(variant: str = "h200") -> ServeConfig:
    """`h200`: one GPU of 141 GB (or, with fewer pages, of 80); `v5e-8`: eight chips of 16 GB."""
    variants = {
        "h200": (
            PlatformConfig(backend=Platform.GPU, chip="h200"),
            EngineConfig(
                num_slots=256,
                max_model_len=16384,
                page_size=64,
                kv_bytes=None,
                mixed_tokens=(512, 2048),
                decode_rows=(8, 64, 256),
            ),
        ),
        "v5e-8": (
            PlatformConfig(backend=Platform.TPU, chip="v5e"),
            EngineConfig(
                num_slots=64,
                max_model_len=8192,
                page_size=128,
                kv_bytes=None,
                mixed_tokens=(128, 1024),
                decode_rows=(8, 64),
                tensor_parallel=8,
            ),
        ),
    }
    if variant not in variants:
        raise ConfigError(f"llama31_8b.py has no variant {variant!r}; one of {list(variants)}")
    platform, engine = variants[variant]
    return ServeConfig(
        model=ModelConfig(
            name="llama-3.1-8b-instruct",
            source="models/Llama-3.1-8B-Instruct",
            dtype=Dtype.BFLOAT16,
        ),
        platform=platform,
        engine=engine,
    )
