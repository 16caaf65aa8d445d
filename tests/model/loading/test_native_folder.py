"""The native form: written from any source, restored into any sharding, every byte verified."""

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

from jserve.checkpoints.config import Dtype, ModelConfig, RandomWeights
from jserve.checkpoints.hf_config import spec_from_hf
from jserve.checkpoints.native_folder import read_manifest, read_spec, write_spec
from jserve.checkpoints.text_assets import byte_level_assets
from jserve.core.errors import ConfigError
from jserve.model.functional import Model
from jserve.model.loading.load import load_params, model_spec, open_source, prepare
from jserve.model.loading.native import restore_native
from jserve.model.params import init_params
from tests.model.model_harness import from_checkpoint
from tests.model_files import tiny_weights, write_gguf, write_hf

FIXTURES = Path("tests/fixtures/models")


def no_progress(done: int, total: int) -> None:
    assert 0 <= done <= total or total == 0


def one_device(model: Model) -> dict[str, Sharding]:
    return dict.fromkeys(model.param_specs(), SingleDeviceSharding(jax.devices()[0]))


def gguf_config(tmp_path: Path, arch: str = "llama", *, tied: bool = True) -> ModelConfig:
    path = write_gguf(tmp_path / f"{arch}.gguf", arch, tiny_weights(arch, tied=tied))
    return ModelConfig(name="tiny", source=str(path), cache_dir=str(tmp_path / "cache"))


def assert_equal(params: Mapping[str, jax.Array], expected: Mapping[str, np.ndarray]) -> None:
    assert set(params) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(np.asarray(params[name]), value, name)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "gemma3"])
def test_gguf_to_arrays(arch: str, tied: bool, tmp_path: Path) -> None:
    config = gguf_config(tmp_path, arch, tied=tied)
    early = model_spec(config, no_progress)
    seen: list[tuple[int, int]] = []
    prepared = prepare(config, lambda done, total: seen.append((done, total)))
    assert prepared.spec == early == model_spec(config, no_progress)
    model = Model(prepared.spec, jnp.dtype(jnp.float32))
    params = load_params(prepared, model, one_device(model))
    assert_equal(params, tiny_weights(arch, tied=tied))
    assert seen[-1] == (sum(value.nbytes for value in params.values()),) * 2
    seen.clear()
    assert prepare(config, lambda done, total: seen.append((done, total))) == prepared
    assert not seen


@pytest.mark.parametrize("case", sorted(p.name for p in FIXTURES.iterdir() if p.is_dir()))
def test_hugging_face_folders_to_arrays(case: str, tmp_path: Path) -> None:
    folder = tmp_path / case
    folder.mkdir()
    for file in (FIXTURES / case).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "tokenizer.json").write_text(byte_level_assets(256, ()).tokenizer_json)
    config = ModelConfig(name=case, source=str(folder), cache_dir=str(tmp_path / "cache"))
    prepared = prepare(config, no_progress)
    model = Model(prepared.spec, jnp.dtype(jnp.float32))
    expected: dict[str, np.ndarray] = {}
    for file in folder.glob("*.safetensors"):
        expected |= load_file(file)
    expected = from_checkpoint(model.param_specs(), expected)
    expected = {name: value.astype(np.float32) for name, value in expected.items()}
    assert_equal(load_params(prepared, model, one_device(model)), expected)


def test_shards_on_eight_devices(tmp_path: Path) -> None:
    prepared = prepare(gguf_config(tmp_path), no_progress)
    model = Model(prepared.spec, jnp.dtype(jnp.float32))
    mesh = Mesh(np.array(jax.devices()).reshape(8), ("model",))
    axes = [P("model"), P(None, "model"), P()]
    shardings: dict[str, Sharding] = {
        name: NamedSharding(mesh, axes[i % 3] if len(spec.shape) == 2 else P())
        for i, (name, spec) in enumerate(model.param_specs().items())
    }
    params = load_params(prepared, model, shardings)
    assert_equal(params, tiny_weights("llama"))
    for name, value in params.items():
        assert value.sharding == shardings[name]
        assert len(value.addressable_shards) == 8


def test_dtypes(tmp_path: Path) -> None:
    config = gguf_config(tmp_path)
    half = ModelConfig(
        name="tiny", source=config.source, cache_dir=config.cache_dir, dtype=Dtype.BFLOAT16
    )
    prepared = prepare(half, no_progress)
    assert prepared.folder != prepare(config, no_progress).folder
    assert prepared.folder is not None
    assert read_manifest(prepared.folder).dtype is Dtype.BFLOAT16
    for dtype in (jnp.bfloat16, jnp.float32):
        model = Model(prepared.spec, jnp.dtype(dtype))
        params = load_params(prepared, model, one_device(model))
        assert {value.dtype for value in params.values()} == {jnp.dtype(dtype)}
        assert_equal(params, tiny_weights("llama"))


def test_random_weights_need_no_file() -> None:
    spec = spec_from_hf(json.loads((FIXTURES / "llama" / "config.json").read_text()))
    config = ModelConfig(name="r", source=RandomWeights(spec=spec, seed=3))
    prepared = prepare(config, no_progress)
    model = Model(prepared.spec, jnp.dtype(jnp.float32))
    params = load_params(prepared, model, one_device(model))
    assert set(params) == set(model.param_specs())
    name = "model.layers.1.mlp.down_proj.weight"
    alone = init_params({name: model.param_specs()[name]}, seed=3)
    np.testing.assert_array_equal(np.asarray(params[name]), np.asarray(alone[name]))


def params_files(folder: Path) -> list[str]:
    return [name for name in read_manifest(folder).files if name.startswith("params/model.")]


def test_a_flipped_bit_anywhere_names_the_tensor(tmp_path: Path) -> None:
    prepared = prepare(gguf_config(tmp_path), no_progress)
    folder = prepared.folder
    assert folder is not None
    model = Model(prepared.spec, jnp.dtype(jnp.float32))
    rng = np.random.default_rng(0)
    for name in params_files(folder):
        path = folder / name
        content = bytearray(path.read_bytes())
        at = int(rng.integers(len(content)))
        content[at] ^= 1 << int(rng.integers(8))
        original = path.read_bytes()
        path.write_bytes(content)
        tensor = name.split("/")[1].replace(".", r"\.")
        with pytest.raises(ConfigError, match=rf"params/{tensor}/\S+ is corrupt"):
            load_params(prepared, model, one_device(model))
        path.write_bytes(original)
    load_params(prepared, model, one_device(model))


def test_missing_and_truncated_files_are_all_named(tmp_path: Path) -> None:
    prepared = prepare(gguf_config(tmp_path), no_progress)
    folder = prepared.folder
    assert folder is not None
    model = Model(prepared.spec, jnp.dtype(jnp.float32))
    cut, gone = params_files(folder)[:2]
    (folder / cut).write_bytes((folder / cut).read_bytes()[:-1])
    (folder / gone).unlink()
    with pytest.raises(ConfigError) as raised:
        load_params(prepared, model, one_device(model))
    assert f"{cut} has " in str(raised.value)
    assert f"{gone} is missing" in str(raised.value)
    assert "Delete the folder" in str(raised.value)


def test_a_derived_value_of_an_earlier_version_is_still_derived(tmp_path: Path) -> None:
    spec = spec_from_hf(json.loads((FIXTURES / "llama" / "config.json").read_text()))
    assert spec.query_scale is None
    write_spec(tmp_path, spec)
    path = tmp_path / "spec.json"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps(stored | {"query_scale": 0.0, "local_rope_theta": 0.0}))
    assert read_spec(tmp_path) == spec


def test_spec_and_manifest_are_verified_too(tmp_path: Path) -> None:
    prepared = prepare(gguf_config(tmp_path), no_progress)
    folder = prepared.folder
    assert folder is not None
    assert read_spec(folder) == prepared.spec
    model = Model(prepared.spec, jnp.dtype(jnp.float32))
    spec = folder / "spec.json"
    spec.write_text(spec.read_text().replace("5000.0", "5001.0"))
    with pytest.raises(ConfigError, match=r"spec\.json is corrupt"):
        load_params(prepared, model, one_device(model))
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text()[:-40])
    with pytest.raises(ConfigError, match=r"manifest\.json: is not JSON"):
        restore_native(folder, model.param_specs(), one_device(model))
    manifest.write_text('{"format": 99}')
    with pytest.raises(ConfigError, match="format 99 is not"):
        restore_native(folder, model.param_specs(), one_device(model))


def test_wrong_tensors_are_all_named_before_anything_is_written(tmp_path: Path) -> None:
    weights = tiny_weights("llama")
    del weights["model.layers.1.mlp.up_proj.weight"]
    weights["model.layers.0.input_layernorm.weight"] = np.ones(63, np.float32)
    weights["model.layers.0.self_attn.gate.weight"] = np.ones((2, 2), np.float32)
    path = write_gguf(tmp_path / "wrong.gguf", "llama", weights)
    config = ModelConfig(name="wrong", source=str(path), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ConfigError) as raised:
        prepare(config, no_progress)
    message = str(raised.value)
    assert message.startswith(str(path))
    assert "model.layers.1.mlp.up_proj.weight is missing" in message
    assert "model.layers.0.input_layernorm.weight has shape (63,), not (64,)" in message
    assert "model.layers.0.self_attn.gate.weight is not part of the model" in message
    assert not (tmp_path / "cache").exists()


def test_surplus_that_says_nothing_new_is_ignored(tmp_path: Path) -> None:
    """A copy of a tied embedding as head, and rotary frequencies of old checkpoints."""
    config = json.loads((FIXTURES / "smollm2" / "config.json").read_text())
    weights = load_file(FIXTURES / "smollm2" / "model.safetensors")
    assert config["tie_word_embeddings"]
    surplus = {
        "lm_head.weight": weights["model.embed_tokens.weight"],
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
    }
    tokenizer = byte_level_assets(256, ()).tokenizer_json
    folder = write_hf(tmp_path / "hf", config, weights | surplus, tokenizer)
    model_config = ModelConfig(name="x", source=str(folder), cache_dir=str(tmp_path / "cache"))
    prepared = prepare(model_config, no_progress)
    assert prepared.folder is not None
    assert set(read_manifest(prepared.folder).tensors) == set(weights)
    save_file(
        weights | {"lm_head.weight": weights["model.embed_tokens.weight"] + 1},
        folder / "model.safetensors",
    )
    with pytest.raises(ConfigError, match=r"lm_head\.weight is not part of the model"):
        prepare(model_config, no_progress)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_name_the_tensor(value: float, tmp_path: Path) -> None:
    weights = tiny_weights("llama")
    weights["model.layers.1.mlp.up_proj.weight"][5, 7] = value
    path = write_gguf(tmp_path / "nan.gguf", "llama", weights)
    config = ModelConfig(name="nan", source=str(path), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN"):
        prepare(config, no_progress)
    assert list((tmp_path / "cache").rglob("*.tmp")) == []


def test_a_changed_source_is_converted_again(tmp_path: Path) -> None:
    config = gguf_config(tmp_path)
    first = prepare(config, no_progress)
    (tmp_path / "llama.gguf").unlink()
    write_gguf(tmp_path / "llama.gguf", "llama", tiny_weights("llama", seed=1))
    second = prepare(config, no_progress)
    assert first.folder != second.folder
    model = Model(second.spec, jnp.dtype(jnp.float32))
    assert_equal(load_params(second, model, one_device(model)), tiny_weights("llama", seed=1))


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(byte_level_assets(256, ()).tokenizer_json)
    with pytest.raises(ConfigError, match="neither a native nor a Hugging Face"):
        open_source(tmp_path)


MEMORY = """
import sys, threading, time
from pathlib import Path
import jax, jax.numpy as jnp
from jserve.checkpoints.config import ModelConfig
from jserve.checkpoints.hf_config import spec_from_hf
from jserve.model.loading.load import load_params, prepare
from jserve.model.functional import Model
from jserve.checkpoints.text_assets import load_text_assets

def rss():  # without the pages of mapped files, which the system drops when it needs them
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024

class Peak(threading.Thread):
    def run(self):
        self.bytes, self.done = rss(), False
        while not self.done:
            self.bytes = max(self.bytes, rss())
            time.sleep(0.001)

def measured(function):
    peak, base = Peak(), rss()
    peak.start()
    result = function()
    peak.done = True
    peak.join()
    return result, peak.bytes - base

config = ModelConfig(name="m", source=sys.argv[1], cache_dir=sys.argv[2])
warm = ModelConfig(name="m", source=sys.argv[3], cache_dir=sys.argv[2])
device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
def load(prepared):
    model = Model(prepared.spec, jnp.dtype(jnp.float32))
    return load_params(prepared, model, dict.fromkeys(model.param_specs(), device))
load(prepare(warm, lambda done, total: None))  # imports, threads
prepared, converting = measured(lambda: prepare(config, lambda done, total: None))
params, loading = measured(lambda: load(prepared))
total = sum(value.nbytes for value in params.values())
largest = max(value.nbytes for value in params.values())
print(total, largest, converting, loading)
"""


def test_host_memory_stays_within_its_bound(tmp_path: Path) -> None:
    """Target arrays + 1.3 × the largest tensor, measured from outside, with 200 MB of weights."""
    rng = np.random.default_rng(0)
    config = json.loads((FIXTURES / "llama" / "config.json").read_text())
    config |= {"vocab_size": 24_000, "hidden_size": 1024, "intermediate_size": 3072}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4}
    config |= {"head_dim": 128, "tie_word_embeddings": True}
    specs = Model(spec_from_hf(config), jnp.dtype(jnp.float32)).param_specs()
    weights = {name: rng.random(spec.shape, np.float32) for name, spec in specs.items()}
    tokenizer = byte_level_assets(24_000, ()).tokenizer_json
    folder = write_hf(tmp_path / "medium", config, weights, tokenizer)
    warm = write_gguf(tmp_path / "warm.gguf", "llama", tiny_weights("llama"))
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, folder, tmp_path / "cache", warm],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    total, largest, converting, loading = map(int, done.stdout.split())
    assert total == sum(value.nbytes for value in weights.values())
    bound = total + 1.3 * largest
    assert converting < 2 * largest, f"{converting / 1e6:.0f} MB, {largest / 1e6:.0f} MB largest"
    assert total < loading < bound, f"{loading / 1e6:.0f} MB, the bound is {bound / 1e6:.0f} MB"
