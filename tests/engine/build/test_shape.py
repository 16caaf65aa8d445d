"""The context that an engine offers is the one the model's positions are meaningful for."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jserve.core.errors import ConfigError
from jserve.core.model_spec import ModelSpec, RopeScaling, RopeScalingKind
from jserve.engine.build.sizing import shape_engine
from jserve.engine.config import EngineConfig
from jserve.model.functional import Model
from jserve.model.sharding import device_mesh

SPEC = ModelSpec(
    family="llama",
    vocab=64,
    layers=1,
    model_dim=16,
    ffn_dim=16,
    q_heads=2,
    kv_heads=1,
    head_dim=8,
    max_position=64,
    norm_eps=1e-5,
    rope_theta=1e4,
)
DYNAMIC = RopeScaling(RopeScalingKind.DYNAMIC, 4.0, original_max_position=64)


@pytest.mark.parametrize(("scaling", "context"), [(None, 64), (DYNAMIC, 256)])
def test_context(scaling: RopeScaling | None, context: int) -> None:
    model = Model(dataclasses.replace(SPEC, rope_scaling=scaling), jnp.float32)
    mesh = device_mesh(jax.devices()[:1], model=1)
    sizes = {None: context, context: context, 40: 40}
    for asked, given in sizes.items():
        config = EngineConfig(max_model_len=asked, num_pages=64)
        assert shape_engine(model, mesh, config, None).max_model_len == given
    with pytest.raises(ConfigError, match=f"max_model_len is {context + 1}.*context is {context}"):
        shape_engine(model, mesh, EngineConfig(max_model_len=context + 1, num_pages=64), None)
