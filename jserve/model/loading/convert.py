"""Converts model files between formats, on request."""

import enum
from pathlib import Path

import jax.numpy as jnp

from jserve.checkpoints.config import Dtype, Quantization
from jserve.checkpoints.tensor_source import Progress
from jserve.core.errors import ConfigError
from jserve.model.functional import Model
from jserve.model.loading.hf_folder import write_hf_folder
from jserve.model.loading.load import open_source
from jserve.model.loading.native import write_native


class Format(enum.Enum):
    NATIVE = "native"
    HUGGING_FACE = "huggingface"


def convert(
    source: Path,
    target: Path,
    to: Format,
    *,
    dtype: Dtype = Dtype.FLOAT32,
    quantization: Quantization = Quantization.NONE,
    progress: Progress,
) -> None:
    """Writes the model in `source` (GGUF file, Hugging Face or native folder) to folder `target`.

    All or nothing. Raises ConfigError naming file and tensor if the source is wrong, or the
    target exists.
    """
    if quantization is not Quantization.NONE and to is not Format.NATIVE:
        raise ConfigError(f"quantization {quantization.value} has no {to.value} form; use native")
    if not source.exists():
        raise ConfigError(f"{source}: there is no such file or folder")
    if target.exists():
        raise ConfigError(f"{target}: exists already; choose another folder or delete it")
    tensors, spec, assets = open_source(source)
    write = write_native if to is Format.NATIVE else write_hf_folder
    model = Model(spec, jnp.dtype(dtype.value), quantization=quantization)
    write(target, model, tensors, assets, progress)
