"""Models with experts: their weights through the files, over devices, and what is refused."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec, SingleDeviceSharding
from safetensors.numpy import load_file

from jserve.checkpoints.config import Quantization
from jserve.checkpoints.native_folder import read_spec
from jserve.checkpoints.text_assets import byte_level_assets
from jserve.core.errors import ConfigError
from jserve.core.model_spec import ModelSpec
from jserve.model.functional import Model
from jserve.model.loading.convert import Format, convert
from jserve.model.loading.hf_folder import hf_config_from_spec
from jserve.model.loading.native import restore_native
from jserve.model.sharding import axis_rules, device_mesh, param_shardings
from jserve.pallas_kernels.backend import Backend
from jserve.pallas_kernels.matmul.panels import to_panels
from jserve.pallas_kernels.quantized_matmul.channels import channel_codes, channel_scales
from tests.model.model_harness import CASES, dense_logits, from_checkpoint
from tests.model_files import write_hf

SPEC = ModelSpec(
    family="qwen3_moe",
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
    experts=8,
    experts_per_token=3,
    expert_ffn_dim=32,
    sparse_layers=(False, True),
)


def no_progress(done: int, total: int) -> None:
    assert 0 <= done <= total


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe_dense_layers"])
def test_hugging_face_to_native_and_back(name: str, tmp_path: Path) -> None:
    config = json.loads((CASES / name / "config.json").read_text())
    weights = load_file(CASES / name / "model.safetensors")
    source = write_hf(tmp_path / "hf", config, weights, byte_level_assets(256, ()).tokenizer_json)
    native, again = tmp_path / "native", tmp_path / "again"
    convert(source, native, Format.NATIVE, progress=no_progress)
    convert(native, tmp_path / "native_again", Format.NATIVE, progress=no_progress)
    for folder in (native, tmp_path / "native_again"):
        for backend in (Backend.CPU, Backend.NATIVE, Backend.TPU):
            _check_arrays(folder, weights, backend)
    for start in (source, native):
        convert(start, again, Format.HUGGING_FACE, progress=no_progress)
        written = load_file(again / "model.safetensors")
        assert set(written) == set(weights)
        for tensor, expected in weights.items():
            np.testing.assert_array_equal(written[tensor], expected, tensor)
        again = tmp_path / "once_more"


def _check_arrays(folder: Path, weights: dict[str, np.ndarray], backend: Backend) -> None:
    """The arrays that a native folder gives one backend are made of `weights`."""
    model = Model(read_spec(folder), jnp.float32, backend)
    specs = model.param_specs()
    here = dict.fromkeys(specs, SingleDeviceSharding(jax.devices()[0]))
    arrays = restore_native(folder, specs, here)
    for name, expected in from_checkpoint(specs, weights).items():
        if backend is Backend.TPU and expected.ndim == 3:
            np.testing.assert_array_equal(arrays[name], expected.swapaxes(1, 2))
            continue
        in_panels = arrays[name].ndim > expected.ndim
        assert in_panels == (backend is Backend.NATIVE and expected.ndim > 1)
        np.testing.assert_array_equal(arrays[name], to_panels(expected) if in_panels else expected)


def test_missing_and_misshapen_experts_are_named(tmp_path: Path) -> None:
    config = json.loads((CASES / "mixtral" / "config.json").read_text())
    weights = load_file(CASES / "mixtral" / "model.safetensors")
    stem = "model.layers.1.block_sparse_moe.experts"
    del weights[f"{stem}.2.w1.weight"]
    weights[f"{stem}.3.w2.weight"] = np.zeros((24, 32), np.float32)
    source = write_hf(tmp_path / "hf", config, weights, byte_level_assets(256, ()).tokenizer_json)
    with pytest.raises(ConfigError) as caught:
        convert(source, tmp_path / "native", Format.NATIVE, progress=no_progress)
    assert f"tensor {stem}.2.w1.weight is missing" in str(caught.value)
    assert f"{stem}.3.w2.weight has shape (24, 32), not (32, 24)" in str(caught.value)


def test_any_layout_is_the_same_model() -> None:
    mesh = device_mesh(jax.devices(), model=4, expert=2)
    decoder, alone = Model(SPEC, jnp.float32, mesh=mesh), Model(SPEC, jnp.float32)
    plain = alone.init(3)
    shardings = param_shardings(decoder.param_specs(), SPEC, mesh)
    layout = shardings["model.layers.1.mlp.experts.down_proj.weight"].spec
    assert layout == PartitionSpec("expert", None, "model")
    layout = shardings["model.layers.1.mlp.experts.up_proj.weight"].spec
    assert layout == PartitionSpec("expert", "model", None)
    spread = decoder.init(3, shardings)
    for name, array in spread.items():
        np.testing.assert_array_equal(array, plain[name], err_msg=name)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, SPEC.vocab, 24), jnp.int32)
    found = dense_logits(decoder)(spread, tokens)
    np.testing.assert_allclose(found, dense_logits(alone)(plain, tokens), rtol=0, atol=1e-5)


def test_experts_are_transposed_for_tpus(tmp_path: Path) -> None:
    """Split as they are named, on the way through a native folder and in matmuls."""
    sizes: dict[str, int] = {"vocab": 256, "layers": 1, "ffn_dim": 32}
    spec = dataclasses.replace(
        SPEC, family="mixtral", sparse_layers=(), weights_sum_to_one=True, **sizes
    )
    mesh = device_mesh(jax.devices(), model=2, expert=4)
    cpu, tpu = Model(spec, jnp.float32), Model(spec, jnp.float32, Backend.TPU, mesh=mesh)
    shardings = param_shardings(tpu.param_specs(), spec, mesh)
    name = "model.layers.0.block_sparse_moe.experts.w1.weight"
    assert tpu.param_specs()[name].shape == (8, 48, 32)
    assert shardings[name].spec == PartitionSpec("expert", None, "model")
    plain, transposed = cpu.init(3), tpu.init(3, shardings)
    np.testing.assert_array_equal(transposed[name], plain[name].swapaxes(1, 2))
    np.testing.assert_allclose(_logits(tpu, transposed), _logits(cpu, plain), atol=1e-4)
    weights: dict[str, np.ndarray] = {}
    for key, array in plain.items():
        source = cpu.param_specs()[key].source
        parts = np.asarray(array) if len(source) > 1 else [np.asarray(array)]
        weights |= dict(zip(source, parts, strict=True))
    assets = byte_level_assets(spec.vocab, ()).tokenizer_json
    folder = write_hf(tmp_path / "hf", hf_config_from_spec(spec), weights, assets)
    convert(folder, tmp_path / "native", Format.NATIVE, progress=no_progress)
    restored = restore_native(tmp_path / "native", tpu.param_specs(), shardings)
    for key, array in transposed.items():
        assert restored[key].sharding.is_equivalent_to(shardings[key], array.ndim), key
        np.testing.assert_array_equal(restored[key], array, err_msg=key)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"experts": 6}, r"mesh: experts \(6\)"),
        ({"expert_ffn_dim": 31}, r"mesh: expert_ffn \(31\)"),
    ],
)
def test_sizes_that_do_not_divide_are_refused(change: dict[str, int], message: str) -> None:
    mesh = device_mesh(jax.devices(), model=2, expert=4)
    with pytest.raises(ConfigError, match=message):
        axis_rules(dataclasses.replace(SPEC, **change), mesh)


@pytest.mark.parametrize("quantization", [Quantization.INT8, Quantization.INT4, Quantization.FP8])
def test_experts_are_not_quantized_so(quantization: Quantization) -> None:
    with pytest.raises(
        ConfigError, match=f"'{quantization.value}': .* choose int8_channel or none"
    ):
        Model(dataclasses.replace(SPEC, model_dim=64), jnp.float32, quantization=quantization)


def _dequantized(params: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The parameters that the model without quantization has."""
    floats = {name: p for name, p in params.items() if not name.endswith((".codes", ".scales"))}
    for name in params.keys() - floats.keys():
        stem = name.rpartition(".")[0]
        codes, scales = params[f"{stem}.codes"], params[f"{stem}.scales"]
        floats[stem] = codes.astype(jnp.float32) * scales[..., None]
    return floats


def _logits(model: Model, params: dict[str, jax.Array]) -> np.ndarray:
    return np.asarray(dense_logits(model)(params, jnp.arange(24, dtype=jnp.int32)))


def test_experts_of_codes() -> None:
    """A model is the same on one device and on eight, and transposed for TPUs."""
    quantized = Model(SPEC, jnp.float32, quantization=Quantization.INT8_CHANNEL)
    params = quantized.init(3)
    name = "model.layers.1.mlp.experts.down_proj.weight"
    assert params[f"{name}.codes"].dtype == jnp.int8
    assert params[f"{name}.codes"].shape == (8, 48, 32)
    assert params[f"{name}.scales"].shape == (8, 48)
    expected = _logits(Model(SPEC, jnp.float32), _dequantized(params))
    np.testing.assert_allclose(_logits(quantized, params), expected, rtol=0, atol=1e-4)
    mesh = device_mesh(jax.devices(), model=2, expert=4)
    spread = Model(SPEC, jnp.float32, Backend.CPU, Quantization.INT8_CHANNEL, mesh)
    shardings = param_shardings(spread.param_specs(), SPEC, mesh)
    assert shardings[f"{name}.codes"].spec == PartitionSpec("expert", None, "model")
    assert shardings[f"{name}.scales"].spec == PartitionSpec("expert", None)
    found = _logits(spread, spread.init(3, shardings))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    transposed = Model(SPEC, jnp.float32, Backend.TPU, Quantization.INT8_CHANNEL).init(3)
    np.testing.assert_array_equal(
        transposed[f"{name}.codes"], params[f"{name}.codes"].swapaxes(1, 2)
    )


def test_experts_of_codes_through_files(tmp_path: Path) -> None:
    """Codes from a Hugging Face folder and from a native one, for CPU and TPU."""
    config = json.loads((CASES / "mixtral" / "config.json").read_text())
    weights = load_file(CASES / "mixtral" / "model.safetensors")
    source = write_hf(tmp_path / "hf", config, weights, byte_level_assets(256, ()).tokenizer_json)
    convert(source, tmp_path / "floats", Format.NATIVE, progress=no_progress)
    for start in (source, tmp_path / "floats"):
        folder = tmp_path / f"{start.name}_codes"
        convert(
            start,
            folder,
            Format.NATIVE,
            quantization=Quantization.INT8_CHANNEL,
            progress=no_progress,
        )
        for backend in (Backend.CPU, Backend.TPU):
            model = Model(read_spec(folder), jnp.float32, backend, Quantization.INT8_CHANNEL)
            specs = model.param_specs()
            here = dict.fromkeys(specs, SingleDeviceSharding(jax.devices()[0]))
            arrays = restore_native(folder, specs, here)
            for name, spec in specs.items():
                stack = np.stack([weights[part] for part in spec.source])
                if not spec.stacked or not name.endswith(".codes"):
                    continue
                codes = channel_codes(stack, jnp.dtype(jnp.int8))
                transposed = codes.swapaxes(1, 2) if backend is Backend.TPU else codes
                np.testing.assert_array_equal(arrays[name], transposed, name)
                scales = channel_scales(stack, jnp.dtype(jnp.int8))
                np.testing.assert_array_equal(arrays[name.replace(".codes", ".scales")], scales)


def test_a_family_without_experts_is_told() -> None:
    with pytest.raises(ConfigError, match="family llama has no layers with experts"):
        Model(dataclasses.replace(SPEC, family="llama"), jnp.float32)


@pytest.mark.parametrize(
    "change",
    [
        {"family": "mixtral", "expert_ffn_dim": 64},
        {"family": "mixtral", "weights_sum_to_one": True, "expert_ffn_dim": 64},
        {"family": "mixtral", "weights_sum_to_one": True, "sparse_layers": ()},
        {"sliding_window": 8, "local_layers": (True, False)},
    ],
)
def test_what_has_no_hugging_face_form_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="Hugging Face form"):
        hf_config_from_spec(dataclasses.replace(SPEC, **change))
