"""Qwen3 30B-A3B, a mixture of 128 experts, in bfloat16 on a TPU v6e-8, from a Hugging Face folder.

Set model.source to the folder that the weights were downloaded to.
"""

from jserve.checkpoints.config import Dtype, ModelConfig
from jserve.config import ServeConfig
from jserve.engine.config import EngineConfig, Platform, PlatformConfig


def get_config() -> ServeConfig:
    """Eight chips of 32 GB, each with 16 of the experts and an eighth of all else."""
    return ServeConfig(
        model=ModelConfig(
            name="qwen3-30b-a3b", source="models/Qwen3-30B-A3B", dtype=Dtype.BFLOAT16
        ),
        platform=PlatformConfig(backend=Platform.TPU, chip="v6e"),
        engine=EngineConfig(
            num_slots=128,
            max_model_len=16384,
            page_size=128,
            kv_bytes=None,
            mixed_tokens=(256, 1024),
            decode_rows=(8, 128),
            tensor_parallel=8,
            expert_parallel=8,  # an eighth of an expert's 768 columns would not fill a tile
        ),
    )
