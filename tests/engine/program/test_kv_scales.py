"""Scales of 8-bit K and V: fit to what a model's heads hold, whatever its weights."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jserve.core.request import Request, SamplingParams
from jserve.engine.config import KVDtype
from jserve.engine.program.kv_scales import measure_kv_scales
from jserve.model.context import StepContext
from jserve.model.functional import Model
from jserve.model.sharding import device_mesh, param_shardings
from jserve.pallas_kernels.backend import Backend
from tests.engine.engine_harness import CONFIG, TINY, Harness, Outcome
from tests.model.model_harness import dense_attend

SPEC = dataclasses.replace(TINY, model_dim=64, head_dim=16, qkv_bias=True, eos_token_ids=())
NARROW = dataclasses.replace(CONFIG, kv_dtype=KVDtype.FLOAT8, mixed_tokens=(32,))
SMALL_V, LARGE_K = 2.0**-15, 2.0**13  # below what 8 bits can tell from 0, and above their largest

Params = dict[str, jax.Array]


def _model(devices: int = 1) -> tuple[Model, jax.sharding.Mesh]:
    mesh = device_mesh(jax.devices()[:devices], model=devices)
    return Model(SPEC, jnp.dtype(jnp.float32), Backend.CPU, mesh=mesh), mesh


def _placed(params: Params, devices: int) -> Params:
    model, mesh = _model(devices)
    shardings = param_shardings(model.param_specs(), SPEC, mesh)
    return {name: jax.device_put(leaf, shardings[name]) for name, leaf in params.items()}


def _measured(params: Params, devices: int = 1) -> np.ndarray:
    measure = jax.jit(functools.partial(measure_kv_scales, *_model(devices)))
    return np.array(measure(_placed(params, devices)))


def _uneven(params: Params) -> Params:
    """A model that computes the same to the bit: head 0 has tiny V, head 1 huge K."""
    dim, group = SPEC.head_dim, SPEC.q_heads // SPEC.kv_heads
    of_head = {0: slice(0, group * dim), 1: slice(group * dim, None)}  # its query heads
    changed = dict(params)
    for name, leaf in params.items():
        if ".v_proj." in name:
            changed[name] = leaf.at[:dim].multiply(SMALL_V)
        elif ".k_proj." in name:
            changed[name] = leaf.at[dim:].multiply(LARGE_K)
        elif ".q_proj." in name:
            changed[name] = leaf.at[of_head[1]].multiply(1 / LARGE_K)
        elif ".o_proj." in name:
            changed[name] = leaf.at[:, of_head[0]].multiply(1 / SMALL_V)
    return changed


@pytest.fixture(scope="module")
def params() -> Params:
    return _model()[0].init(0)


def test_scales_follow_the_weights_exactly(params: Params) -> None:
    expected = _measured(params)
    assert expected.shape == (SPEC.layers, 2, SPEC.kv_heads)
    expected[:, 0, 1] *= LARGE_K
    expected[:, 1, 0] *= SMALL_V
    np.testing.assert_array_equal(_measured(_uneven(params)), expected)


def test_other_tokens_fit_with_room_on_both_sides(params: Params) -> None:
    uneven, (model, _) = _uneven(params), _model()
    scales = _measured(uneven)
    assert np.array_equal(np.exp2(np.round(np.log2(scales))), scales)
    tokens = np.random.default_rng(5).integers(0, SPEC.vocab, 100)

    def attend(
        q: jax.Array, k: jax.Array, v: jax.Array, _: None, window: int
    ) -> tuple[jax.Array, jax.Array]:
        return dense_attend(q, k, v, None, window)[0], jnp.stack([k, v])

    places = jnp.arange(len(tokens), dtype=jnp.int32)
    empty = (None,) * SPEC.layers
    read = jax.jit(lambda *values: model.hidden(*values, places, empty, StepContext(attend))[1])
    kv = read(uneven, jnp.asarray(tokens, jnp.int32))
    held = np.stack([np.asarray(layer) for layer in kv])  # [layers, K|V, tokens, kv_heads, dim]
    held /= scales[:, :, None, :, None]
    assert np.abs(held).max() < 448
    usual = np.sqrt(np.mean(np.square(held), axis=(2, 4)))
    assert usual.min() > 2
    assert usual.max() < 16


@pytest.mark.parametrize("devices", [2, 4])
def test_devices_agree(params: Params, devices: int) -> None:
    copies = max(devices // SPEC.kv_heads, 1)
    expected = np.repeat(_measured(params), copies, axis=2)
    np.testing.assert_array_equal(_measured(params, devices), expected)


@pytest.mark.sweep
@pytest.mark.parametrize("devices", [1, 2 * SPEC.kv_heads])
def test_an_engine_loses_nothing_to_uneven_heads(
    params: Params, devices: int, tmp_path: Path
) -> None:
    """The same holds where neighbours have copies of a KV head."""
    even = _served(params, devices, tmp_path)
    uneven = _served(_uneven(params), devices, tmp_path)
    assert uneven.tokens == even.tokens
    found, expected = ([one.logprob for one in outcome.logprobs] for outcome in (uneven, even))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def _served(params: Params, devices: int, cache_folder: Path) -> Outcome:
    harness = Harness(
        SPEC,
        NARROW,
        params=_placed(params, devices),
        backend=Backend.CPU,
        mesh_shape=(devices, 1),
        cache_folder=cache_folder,
    )
    sampling = SamplingParams(max_tokens=8, temperature=0.0, logprobs=2)
    return harness.run([Request(id="a", prompt=tuple(range(3, 40)), sampling=sampling)])["a"]
