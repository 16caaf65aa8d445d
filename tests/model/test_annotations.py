"""Shapes and dtypes in signatures of the model are checked while tests run."""

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from jserve.core.model_spec import ModelSpec
from jserve.model.context import StepContext
from jserve.model.functional import Model
from jserve.model.sampling.sharded_vocab import argmax
from tests.model.model_harness import dense_attend

pytestmark = pytest.mark.optimized  # the part of the suite that checks annotations

SPEC = ModelSpec(
    family="llama",
    vocab=32,
    layers=1,
    model_dim=16,
    ffn_dim=16,
    q_heads=2,
    kv_heads=2,
    head_dim=8,
    max_position=16,
    norm_eps=1e-5,
    rope_theta=1e4,
)


def _hidden(positions: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    model = Model(SPEC, jnp.float32)
    params = {
        name: jax.ShapeDtypeStruct(spec.shape, spec.dtype)
        for name, spec in model.param_specs().items()
    }
    tokens = jax.ShapeDtypeStruct((4,), jnp.int32)

    def hidden(params: dict[str, jax.Array], tokens: jax.Array, positions: jax.Array) -> jax.Array:
        return model.hidden(params, tokens, positions, (None,), StepContext(dense_attend))[0]

    return jax.eval_shape(hidden, params, tokens, positions)


def test_a_wrong_shape_or_dtype_raises() -> None:
    assert _hidden(jax.ShapeDtypeStruct((4,), jnp.int32)).shape == (4, SPEC.model_dim)
    with pytest.raises(TypeCheckError, match="positions"):
        _hidden(jax.ShapeDtypeStruct((5,), jnp.int32))
    with pytest.raises(TypeCheckError, match="positions"):
        _hidden(jax.ShapeDtypeStruct((4,), jnp.float32))


def test_the_sampler_is_checked_too() -> None:
    assert argmax(jnp.asarray([[1.0, 3.0]])).tolist() == [1]
    with pytest.raises(TypeCheckError, match="'x'"):
        argmax(jnp.asarray([1.0, 3.0]))
