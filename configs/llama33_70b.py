"""Llama 3.3 70B Instruct in bfloat16 on a TPU v5p-8, from a Hugging Face folder.

Set model.source to the folder that the weights were downloaded to.
"""

from jserve.checkpoints.config import Dtype, ModelConfig
from jserve.config import ServeConfig
from jserve.engine.config import EngineConfig, Platform, PlatformConfig


def get_config() -> ServeConfig:
    """A v5p-8 is named after its cores: it has four chips of 95 GB, a device each."""
    return ServeConfig(
        model=ModelConfig(
            name="llama-3.3-70b-instruct",
            source="models/Llama-3.3-70B-Instruct",
            dtype=Dtype.BFLOAT16,
        ),
        platform=PlatformConfig(backend=Platform.TPU, chip="v5p"),
        engine=EngineConfig(
            num_slots=128,
            max_model_len=16384,
            page_size=128,
            kv_bytes=None,
            mixed_tokens=(256, 1024),
            decode_rows=(8, 128),
            tensor_parallel=4,
        ),
    )
