"""Models with quantized weights: against their own weights in float32, and through the files."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec, SingleDeviceSharding

from jserve.checkpoints.config import ModelConfig, Quantization, check_platform
from jserve.checkpoints.gguf_file import GgufFile
from jserve.checkpoints.locate import locate
from jserve.config import load
from jserve.core.errors import ConfigError
from jserve.core.model_spec import ModelSpec
from jserve.model.functional import Model
from jserve.model.loading.convert import Format, convert
from jserve.model.loading.load import load_params, open_source, prepare
from jserve.model.sharding import DEVICES, device_mesh, param_shardings
from jserve.pallas_kernels.backend import Backend
from jserve.pallas_kernels.quantized_matmul import channels
from jserve.pallas_kernels.quantized_matmul.channels import ChannelMatrix
from jserve.pallas_kernels.quantized_matmul.matrix import QuantizedMatrix, dequantize
from tests.backends import NATIVE_MARKS
from tests.model.model_harness import dense_logits
from tests.model_files import tiny_weights, write_gguf

ROOT = Path(__file__).parents[2]
SPEC = ModelSpec(
    family="llama",
    vocab=256,
    layers=2,
    model_dim=64,
    ffn_dim=96,
    q_heads=4,
    kv_heads=2,
    head_dim=32,
    max_position=128,
    norm_eps=1e-5,
    rope_theta=1e4,
    qkv_bias=True,
)
BITS = {Quantization.INT8: 8, Quantization.INT4: 4}
BY_CHANNEL = (Quantization.INT8_CHANNEL, Quantization.FP8)


def no_progress(done: int, total: int) -> None:
    del done, total


def floats(params: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The same model with the values of its quantized weights."""
    dense = {name: p for name, p in params.items() if not name.endswith((".codes", ".scales"))}
    for name in params:
        if name.endswith(".codes"):
            stem = name.removesuffix(".codes")
            parts = params[name], params[f"{stem}.scales"]
            by_channel = parts[0].dtype in channels.CODES
            dense[stem] = (
                channels.dequantize(ChannelMatrix(*parts))
                if by_channel
                else dequantize(QuantizedMatrix(*parts))
            )
    return dense


def logits(model: Model, params: dict[str, jax.Array], tokens: np.ndarray) -> np.ndarray:
    return np.asarray(dense_logits(model)(params, jnp.asarray(tokens)))


@pytest.mark.parametrize(
    ("backend", "tied"),
    [
        pytest.param(Backend.NATIVE, True, marks=NATIVE_MARKS),
        (Backend.CPU, False),
        pytest.param(Backend.CPU, True, marks=pytest.mark.sweep),
        pytest.param(Backend.REFERENCE, True, marks=pytest.mark.sweep),
        pytest.param(Backend.REFERENCE, False, marks=pytest.mark.sweep),
        pytest.param(Backend.NATIVE, False, marks=(*NATIVE_MARKS, pytest.mark.sweep)),
    ],
)
@pytest.mark.parametrize("quantization", BITS)
def test_only_activations_are_rounded(
    quantization: Quantization, backend: Backend, tied: bool
) -> None:
    spec = dataclasses.replace(SPEC, tied_embeddings=tied)
    model = Model(spec, jnp.float32, backend, quantization)
    params = model.init(0)
    bits = {
        QuantizedMatrix(p, params[name.replace(".codes", ".scales")]).bits
        for name, p in params.items()
        if name.startswith("model.layers.") and name.endswith(".codes")
    }
    assert bits == {BITS[quantization]}
    tokens = np.random.default_rng(0).integers(0, spec.vocab, 24).astype(np.int32)
    exact = logits(Model(spec, jnp.float32), floats(params), tokens)
    found = logits(model, params, tokens)
    # Eight bits a group of 32: half a percent of noise in each of some dozen matmuls.
    assert np.std(found - exact) < 0.03 * np.std(exact)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("quantization", BY_CHANNEL)
def test_by_channel_no_activation_is_rounded(quantization: Quantization, tied: bool) -> None:
    spec = dataclasses.replace(SPEC, tied_embeddings=tied)
    model = Model(spec, jnp.float32, Backend.CPU, quantization)
    params = model.init(0)
    kinds = {name: array.dtype for name, array in params.items() if name.endswith(".codes")}
    head = "model.embed_tokens.weight" if tied else "lm_head.weight"
    assert kinds[f"{head}.codes"] == jnp.int8
    assert (
        kinds["model.layers.1.mlp.up_proj.weight.codes"]
        == channels.CODES[quantization is Quantization.FP8]
    )
    tokens = np.random.default_rng(0).integers(0, spec.vocab, 24).astype(np.int32)
    exact = logits(Model(spec, jnp.float32), floats(params), tokens)
    np.testing.assert_allclose(logits(model, params, tokens), exact, rtol=0, atol=1e-4)
    assert set(model.unaccelerated_weights()) == {name.removesuffix(".codes") for name in kinds}


@pytest.mark.parametrize(
    ("quantization", "backend", "devices"),
    [(Quantization.FP8, Backend.CPU, 8), (Quantization.INT8_CHANNEL, Backend.TPU, 2)],
    ids=["xla", "tpu kernel"],
)
def test_over_devices_it_is_the_same_model(
    quantization: Quantization, backend: Backend, devices: int
) -> None:
    sizes: dict[str, int] = {"layers": 1, "model_dim": 128, "ffn_dim": 256, "q_heads": 8}
    spec = dataclasses.replace(SPEC, kv_heads=8, **sizes)
    mesh = device_mesh(jax.devices()[:devices], model=devices)
    model = Model(spec, jnp.float32, backend, quantization, mesh)
    shardings = param_shardings(model.param_specs(), spec, mesh)
    layer, axis = "model.layers.0.", DEVICES
    for name, codes, scales in (
        ("self_attn.q_proj", (axis, None), (axis,)),
        ("self_attn.o_proj", (None, axis), (None,)),
        ("mlp.down_proj", (None, axis), (None,)),
    ):
        assert shardings[f"{layer}{name}.weight.codes"].spec == PartitionSpec(*codes)
        assert shardings[f"{layer}{name}.weight.scales"].spec == PartitionSpec(*scales)
    assert bool(model.unaccelerated_weights()) == (backend is Backend.CPU)
    tokens = np.random.default_rng(0).integers(0, spec.vocab, 24).astype(np.int32)
    alone = Model(spec, jnp.float32, Backend.CPU, quantization)
    expected = logits(alone, alone.init(1), tokens)
    # The XLA path needs no interpreter, and takes no notice of one.
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
        found = logits(model, model.init(1, shardings), tokens)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
def test_the_layout_of_the_cpu_is_refused_elsewhere(platform: str) -> None:
    for quantization in BITS:
        with pytest.raises(ConfigError, match=f"a {platform}; choose int8_channel or fp8"):
            check_platform(quantization, platform)
    for quantization in (Quantization.NONE, *BY_CHANNEL):
        check_platform(quantization, platform)
        check_platform(quantization, "cpu")


@pytest.mark.parametrize("quantization", [*BITS, *BY_CHANNEL])
def test_from_file_to_arrays(quantization: Quantization, tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "llama.gguf", "llama", tiny_weights("llama"))
    config = ModelConfig(
        name="tiny",
        source=str(source),
        quantization=quantization,
        cache_dir=str(tmp_path / "cache"),
    )
    prepared = prepare(config, no_progress)
    model = Model(prepared.spec, jnp.float32, quantization=quantization)
    here = dict.fromkeys(model.param_specs(), SingleDeviceSharding(jax.devices()[0]))
    params = load_params(prepared, model, here)
    for name, weight in tiny_weights("llama").items():
        if f"{name}.codes" not in params:
            np.testing.assert_array_equal(params[name], weight, name)
            continue
        found = floats({key: params[key] for key in (f"{name}.codes", f"{name}.scales")})[name]
        if quantization in BY_CHANNEL:
            eight_bits = quantization is Quantization.INT8_CHANNEL or "embed_tokens" in name
            relative = 0 if eight_bits else 2**-4
            bound = np.abs(weight).max() / 127 * (0.51 if eight_bits else 0.1)
            np.testing.assert_allclose(found, weight, rtol=relative, atol=bound)
            continue
        codes = 2 ** (8 if "embed_tokens" in name else BITS[quantization]) - 1
        np.testing.assert_allclose(found, weight, rtol=0, atol=np.ptp(weight) / codes)
    assert prepared.folder is not None
    plain = dataclasses.replace(config, source=str(prepared.folder), quantization=Quantization.NONE)
    with pytest.raises(ConfigError, match=f"holds '{quantization.value}' weights"):
        prepare(plain, no_progress)
    with pytest.raises(ConfigError, match="convert the model that it was made from"):
        open_source(prepared.folder)


def test_convert(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "llama.gguf", "llama", tiny_weights("llama"))
    target = tmp_path / "native"
    convert(source, target, Format.NATIVE, quantization=Quantization.INT8, progress=no_progress)
    config = ModelConfig(name="tiny", source=str(target), quantization=Quantization.INT8)
    assert prepare(config, no_progress).folder == target
    with pytest.raises(ConfigError, match="no huggingface form"):
        convert(
            source,
            tmp_path / "hf",
            Format.HUGGING_FACE,
            quantization=Quantization.INT8,
            progress=no_progress,
        )


def test_sizes_that_do_not_divide() -> None:
    spec = dataclasses.replace(SPEC, ffn_dim=100)
    with pytest.raises(ConfigError, match=r"quantization is 'int4'.*\(100, 64\)"):
        Model(spec, jnp.float32, quantization=Quantization.INT4)


@pytest.mark.network
def test_smollm2_keeps_the_weights_of_its_file() -> None:
    config = load(str(ROOT / "configs" / "smollm2_135m_fast.py")).model
    prepared = prepare(config, no_progress)
    model = Model(prepared.spec, jnp.float32, quantization=config.quantization)
    here = dict.fromkeys(model.param_specs(), SingleDeviceSharding(jax.devices()[0]))
    params = load_params(prepared, model, here)
    path = locate(config, no_progress)
    assert path is not None
    file = GgufFile(path)
    for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"):
        name = f"model.layers.7.{name}.weight"
        found = floats({key: params[key] for key in (f"{name}.codes", f"{name}.scales")})[name]
        stored = file.read_rows(name, 0, file.tensors()[name].shape[0])
        np.testing.assert_allclose(found, stored, rtol=0, atol=1e-6)
