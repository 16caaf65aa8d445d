"""Sources of weights: named tensors read on demand. No JAX."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

# Called with the progress of a long task: bytes done, bytes in all (0 if not known).
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Shape of a stored tensor (as read, after dequantization) and the type it is stored in."""

    shape: tuple[int, ...]
    stored_dtype: str


@runtime_checkable
class TensorSource(Protocol):
    """A model file or folder. Names and layouts are Hugging Face's, whatever the format.

    Linear weights are [out, in]; rotary dimensions are in Hugging Face's half-split order.
    """

    @property
    def path(self) -> Path:
        """The file or folder, for messages."""
        ...

    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor, without reading any."""
        ...

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of the first axis, float32 (or the stored float type).

        Raises ConfigError naming file and tensor when the data is truncated or corrupt.
        """
        ...
