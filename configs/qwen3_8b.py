"""Qwen3 8B in bfloat16 on one GPU of 80 GB, from a Hugging Face folder.

Set model.source to the folder that the weights were downloaded to.
"""

from jserve.checkpoints.config import Dtype, ModelConfig
from jserve.config import ServeConfig
from jserve.engine.config import EngineConfig, Platform, PlatformConfig


def get_config() -> ServeConfig:
    """KV pages take what the programs leave of the device."""
    return ServeConfig(
        model=ModelConfig(name="qwen3-8b", source="models/Qwen3-8B", dtype=Dtype.BFLOAT16),
        platform=PlatformConfig(backend=Platform.GPU, chip="h100"),
        engine=EngineConfig(
            num_slots=128,
            max_model_len=16384,
            page_size=64,
            kv_bytes=None,
            mixed_tokens=(256, 2048),
            decode_rows=(8, 128),
        ),
    )
