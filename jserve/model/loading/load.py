"""Loads a configured model: its spec, and its parameters on devices, by way of the native form."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from jserve.checkpoints.config import ModelConfig, PypiFile, RandomWeights
from jserve.checkpoints.fetch import check_digest
from jserve.checkpoints.gguf_file import GgufFile
from jserve.checkpoints.gguf_spec import spec_from_gguf
from jserve.checkpoints.hf_config import spec_from_hf
from jserve.checkpoints.json_file import read_json
from jserve.checkpoints.locate import locate, native_path, remove_abandoned_files
from jserve.checkpoints.native_folder import is_native, read_manifest, read_spec
from jserve.checkpoints.safetensors_folder import SafetensorsFolder
from jserve.checkpoints.tensor_source import Progress, TensorSource
from jserve.checkpoints.text_assets import TextAssets, load_text_assets
from jserve.core.errors import ConfigError
from jserve.core.model_spec import ModelSpec
from jserve.model.functional import Model
from jserve.model.loading.native import restore_native, write_native
from jserve.model.loading.native_source import NativeSource


@dataclass(frozen=True, slots=True)
class PreparedModel:
    """A model whose files are complete and in the native form; nothing is loaded yet."""

    spec: ModelSpec
    folder: Path | None  # None: random weights
    seed: int = 0


def model_spec(config: ModelConfig, progress: Progress) -> ModelSpec:
    """Reads the spec alone, from headers, so that programs compile while weights are converted.

    Raises ConfigError if the model cannot be had or is of an unknown kind.
    """
    source = locate(config, progress)
    if source is None:
        assert isinstance(config.source, RandomWeights)
        return config.source.spec
    folder = native_path(config, source)
    if is_native(folder):
        return read_spec(folder)
    # open_source would make a tokenizer of a GGUF file's metadata, which takes seconds.
    return open_source(source)[1] if source.is_dir() else spec_from_gguf(GgufFile(source))


def architecture(config: ModelConfig, progress: Progress) -> ModelSpec:
    """The spec for shapes alone: of a Hugging Face folder, config.json is enough."""
    source = locate(config, progress)
    if source is None or not (source / "config.json").is_file() or is_native(source):
        return model_spec(config, progress)
    return spec_from_hf(read_json(source / "config.json"))


def prepare(config: ModelConfig, progress: Progress) -> PreparedModel:
    """Fetches and converts whatever is missing; instant when it was done before.

    Raises ConfigError naming file and tensor if anything about the model is wrong.
    """
    remove_abandoned_files(config)
    source = locate(config, progress)
    if source is None:
        assert isinstance(config.source, RandomWeights)
        return PreparedModel(config.source.spec, None, config.source.seed)
    folder = native_path(config, source)
    if not is_native(folder):
        if isinstance(config.source, PypiFile):
            check_digest(source, config.source.sha256)
        to_native(source, folder, config, progress)
    elif (stored := read_manifest(folder).quantization) is not config.quantization:
        raise ConfigError(
            f"model.quantization is {config.quantization.value!r}, but {folder} holds "
            f"{stored.value!r} weights"
        )
    return PreparedModel(read_spec(folder), folder)


def load_params(
    prepared: PreparedModel, model: Model, shardings: Mapping[str, Sharding]
) -> dict[str, jax.Array]:
    """The parameters of `model`, each on its devices."""
    if prepared.folder is None:
        return model.init(prepared.seed, shardings)
    return restore_native(prepared.folder, model.param_specs(), shardings)


def to_native(source: Path, folder: Path, config: ModelConfig, progress: Progress) -> None:
    """Converts a GGUF file or a Hugging Face folder to a native folder, all or nothing."""
    tensors, spec, assets = open_source(source)
    model = Model(spec, jnp.dtype(config.dtype.value), quantization=config.quantization)
    write_native(folder, model, tensors, assets, progress)


def open_source(source: Path) -> tuple[TensorSource, ModelSpec, TextAssets]:
    """Tensors, spec and text side of a GGUF file, a Hugging Face or a native folder.

    Reads headers only. Raises ConfigError if `source` is none of them, or is damaged.
    """
    assets = load_text_assets(source)
    if is_native(source):
        return NativeSource(source), read_spec(source), assets
    if source.is_dir():
        if not (source / "config.json").is_file():
            raise ConfigError(f"{source}: is neither a native nor a Hugging Face model folder")
        tensors: TensorSource = SafetensorsFolder(source)
        spec = spec_from_hf(read_json(source / "config.json"))
    else:
        tensors = GgufFile(source)
        spec = spec_from_gguf(tensors)
    return tensors, dataclasses.replace(spec, eos_token_ids=assets.eos_token_ids), assets
