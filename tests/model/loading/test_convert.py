"""Conversions there and back, through every format."""

import dataclasses
import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from jserve.checkpoints.config import Dtype
from jserve.checkpoints.hf_config import spec_from_hf
from jserve.checkpoints.native_folder import read_spec
from jserve.checkpoints.text_assets import byte_level_assets, load_text_assets
from jserve.core.errors import ConfigError
from jserve.model.loading.convert import Format, convert
from jserve.model.loading.hf_folder import hf_config_from_spec
from jserve.model.loading.load import open_source
from tests.model_files import tiny_weights, write_gguf, write_hf

FIXTURES = Path("tests/fixtures/models")
CASES = sorted(path.name for path in FIXTURES.iterdir() if path.is_dir())


def no_progress(done: int, total: int) -> None:
    assert 0 <= done <= total


@pytest.mark.parametrize("case", CASES)
def test_a_config_is_a_spec_and_back(case: str) -> None:
    spec = spec_from_hf(json.loads((FIXTURES / case / "config.json").read_text()))
    again = spec_from_hf(json.loads(json.dumps(hf_config_from_spec(spec))))
    assert again == dataclasses.replace(spec, query_scale=again.query_scale)
    assert (again.query_scale is None) == (spec.query_scale is None)
    assert again.attention_scale == pytest.approx(spec.attention_scale, rel=1e-6)


@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "gemma3", "mixtral", "qwen3moe"])
def test_gguf_to_native_to_hugging_face(arch: str, tmp_path: Path) -> None:
    weights = tiny_weights(arch, tied=False)
    gguf = write_gguf(tmp_path / "m.gguf", arch, weights)
    native, folder = tmp_path / "native", tmp_path / "hf"
    convert(gguf, native, Format.NATIVE, progress=no_progress)
    convert(native, folder, Format.HUGGING_FACE, progress=no_progress)
    written = load_file(folder / "model.safetensors")
    assert set(written) == set(weights)
    for name, expected in weights.items():
        np.testing.assert_array_equal(written[name], expected)
    assert open_source(folder)[1] == read_spec(native) == open_source(gguf)[1]
    theirs, ours = load_text_assets(gguf), load_text_assets(folder)
    assert ours.eos_token_ids == theirs.eos_token_ids
    assert ours.chat_template == theirs.chat_template
    text = "hello <|im_end|> wörld"
    ids = [Tokenizer.from_str(assets.tokenizer_json).encode(text).ids for assets in (theirs, ours)]
    assert ids[0] == ids[1]


def test_half_precision_rounds_to_nearest(tmp_path: Path) -> None:
    config = json.loads((FIXTURES / "llama" / "config.json").read_text())
    weights = load_file(FIXTURES / "llama" / "model.safetensors")
    weights = {name: value * np.float32(1.00390625) for name, value in weights.items()}
    source = write_hf(tmp_path / "hf", config, weights, byte_level_assets(256, ()).tokenizer_json)
    target = tmp_path / "half"
    convert(source, target, Format.HUGGING_FACE, dtype=Dtype.BFLOAT16, progress=no_progress)
    for name, value in load_file(target / "model.safetensors").items():
        assert value.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(value, weights[name].astype(ml_dtypes.bfloat16))
    assert json.loads((target / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_what_cannot_be_converted_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    weights = tiny_weights("llama")
    del weights["model.norm.weight"]
    broken = write_gguf(tmp_path / "broken.gguf", "llama", weights)
    target = tmp_path / "target"
    for to in Format:
        with pytest.raises(
            ConfigError, match=r"broken\.gguf: tensor model\.norm\.weight is missing"
        ):
            convert(broken, target, to, progress=no_progress)
        with pytest.raises(ConfigError, match="there is no such file"):
            convert(tmp_path / "none", target, to, progress=no_progress)
        with pytest.raises(ConfigError, match="exists already"):
            convert(broken, tmp_path, to, progress=no_progress)
    assert [path.name for path in tmp_path.iterdir()] == ["broken.gguf"]
