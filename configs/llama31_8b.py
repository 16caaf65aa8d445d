"""Llama 3.1 8B Instruct in bfloat16, from a Hugging Face folder: `llama31_8b.py[:gpu|:tpu]`.

Set model.source to the folder that the weights were downloaded to.
"""

from jserve.config import PlatformConfig, ServeConfig
from jserve.core.errors import ConfigError
from jserve.engine.config import EngineConfig
from jserve.model.config import ModelConfig


def get_config(variant: str = "gpu") -> ServeConfig:
    """`gpu`: one device of 80 GB; `tpu`: the eight chips of a v5e-8, 16 GB each."""
    engines = {
        "gpu": EngineConfig(
            num_slots=128,
            max_model_len=16384,
            page_size=64,
            kv_bytes=0,
            mixed_tokens=(256, 2048),
            window_rows=(8, 128),
        ),
        "tpu": EngineConfig(
            num_slots=64,
            max_model_len=8192,
            page_size=128,
            kv_bytes=0,
            mixed_tokens=(128, 1024),
            window_rows=(8, 64),
            tensor_parallel=8,
        ),
    }
    if variant not in engines:
        raise ConfigError(f"llama31_8b.py has no variant {variant!r}; one of {list(engines)}")
    return ServeConfig(
        model=ModelConfig(
            name="llama-3.1-8b-instruct", source="models/Llama-3.1-8B-Instruct", dtype="bfloat16"
        ),
        platform=PlatformConfig(backend=variant),
        engine=engines[variant],
    )
