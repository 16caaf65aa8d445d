"""Parameters over eight devices: where they lie, that the model is the same, what is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jserve.core.errors import ConfigError
from jserve.core.model_spec import ModelSpec
from jserve.model.functional import Model
from jserve.model.sharding import axis_rules, device_mesh, param_shardings
from tests.model.model_harness import dense_logits

SPEC = ModelSpec(
    family="llama",
    vocab=128,
    layers=2,
    model_dim=48,
    ffn_dim=64,
    q_heads=16,
    kv_heads=8,
    head_dim=8,
    max_position=64,
    norm_eps=1e-5,
    rope_theta=1e4,
    qkv_bias=True,
    output_bias=True,
    ffn_bias=True,
)
FEW_KV_HEADS = dataclasses.replace(SPEC, kv_heads=2)
TIED = dataclasses.replace(SPEC, family="gemma3", tied_embeddings=True, kv_heads=1)


@pytest.mark.parametrize("spec", [SPEC, FEW_KV_HEADS, TIED], ids=["kv 8", "kv 2", "kv 1, tied"])
def test_any_layout_is_the_same_model(spec: ModelSpec) -> None:
    model = Model(spec, jnp.float32)
    plain = model.init(3)
    mesh = device_mesh(jax.devices(), model=8)
    shardings = param_shardings(model.param_specs(), spec, mesh)
    spread = model.init(3, shardings)
    for name, array in spread.items():
        assert array.sharding.is_equivalent_to(shardings[name], array.ndim), name
        np.testing.assert_array_equal(array, plain[name], err_msg=name)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, spec.vocab, 24), jnp.int32)
    logits = dense_logits(model)
    np.testing.assert_allclose(logits(spread, tokens), logits(plain, tokens), rtol=0, atol=1e-5)


def test_what_is_split_and_what_is_not() -> None:
    mesh = device_mesh(jax.devices(), model=8)
    model = Model(FEW_KV_HEADS, jnp.float32)
    shardings = param_shardings(model.param_specs(), FEW_KV_HEADS, mesh)
    layout = {name: sharding.spec for name, sharding in shardings.items()}
    layer = "model.layers.1."
    every, whole = ("model", "expert"), PartitionSpec
    out, into = whole(every, None), whole(None, every)
    assert layout["model.embed_tokens.weight"] == layout["lm_head.weight"] == out
    assert layout[layer + "self_attn.q_proj.weight"] == out
    assert layout[layer + "self_attn.q_proj.bias"] == whole(every)
    assert layout[layer + "self_attn.k_proj.weight"] == whole(None, None)
    assert layout[layer + "self_attn.o_proj.weight"] == into
    assert layout[layer + "self_attn.o_proj.bias"] == whole(None)
    assert layout[layer + "mlp.gate_proj.weight"] == out
    assert layout[layer + "mlp.down_proj.weight"] == into
    assert layout[layer + "input_layernorm.weight"] == whole(None)


def test_a_vocabulary_that_does_not_divide_is_everywhere() -> None:
    mesh = device_mesh(jax.devices(), model=8)
    odd = dataclasses.replace(SPEC, vocab=129)
    shardings = param_shardings(Model(odd, jnp.float32).param_specs(), odd, mesh)
    assert shardings["lm_head.weight"].is_fully_replicated
    assert not shardings["model.layers.1.mlp.up_proj.weight"].is_fully_replicated


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ffn_dim": 60}, "ffn"),
        ({"q_heads": 12, "kv_heads": 12}, "q_heads"),
        ({"q_heads": 24, "kv_heads": 12}, "kv_heads"),
        ({"q_heads": 24, "kv_heads": 3}, "kv_heads"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(change: dict[str, int], message: str) -> None:
    mesh = device_mesh(jax.devices(), model=8)
    with pytest.raises(ConfigError, match=rf"mesh: {message} \(\d+\)"):
        axis_rules(dataclasses.replace(SPEC, **change), mesh)


def test_a_mesh_uses_every_device() -> None:
    with pytest.raises(ConfigError, match="number of devices"):
        device_mesh(jax.devices(), model=4)
    assert dict(device_mesh(jax.devices(), model=4, expert=2).shape) == {"model": 4, "expert": 2}


def test_init_depends_on_seed_and_name_only() -> None:
    small = Model(dataclasses.replace(SPEC, layers=1), jnp.float32).init(0)
    large = Model(SPEC, jnp.float32).init(0)
    for name, array in small.items():
        np.testing.assert_array_equal(array, large[name], err_msg=name)
    weight = "model.layers.0.mlp.up_proj.weight"
    assert not np.array_equal(large[weight], large[weight.replace("up", "gate")])
    assert not np.array_equal(large[weight], Model(SPEC, jnp.float32).init(1)[weight])
    np.testing.assert_allclose(np.std(large[weight]), SPEC.model_dim**-0.5, rtol=0.05)
