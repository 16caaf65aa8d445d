"""A two-layer model with random weights and no files: starts in seconds, for tests and trials."""

from jserve.checkpoints.config import ModelConfig, RandomWeights
from jserve.config import ServeConfig
from jserve.core.model_spec import ModelSpec
from jserve.engine.config import EngineConfig


def get_config() -> ServeConfig:
    """Small in everything, but with every kind of program that a real model has."""
    spec = ModelSpec(
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
    )
    return ServeConfig(
        model=ModelConfig(name="tiny-random", source=RandomWeights(spec=spec)),
        engine=EngineConfig(
            num_slots=8,
            num_pages=512,
            mixed_tokens=(16, 64),
            decode_rows=(2, 8),
        ),
    )
