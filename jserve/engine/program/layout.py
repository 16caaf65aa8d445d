"""Named sections of one int32 buffer: declared once, written by name, read by name.

`result_layout` declares what a program returns to the host; `batch.layout` what it is given.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jserve.core.step import Program


@dataclass(frozen=True, slots=True)
class _Section:
    start: int
    stop: int
    shape: tuple[int, ...]


class Layout(Mapping[str, _Section]):
    """Sections by name, one behind the other."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]) -> None:
        self._sections: dict[str, _Section] = {}
        self.size = 0
        for name, shape in shapes.items():
            stop = self.size + math.prod(shape)
            self._sections[name] = _Section(self.size, stop, shape)
            self.size = stop

    def __getitem__(self, name: str) -> _Section:
        return self._sections[name]

    def __iter__(self):
        return iter(self._sections)

    def __len__(self) -> int:
        return len(self._sections)

    def views(self, buffer: np.ndarray) -> dict[str, np.ndarray]:
        """The sections of a host buffer, writable if it is."""
        return {
            name: buffer[part.start : part.stop].reshape(part.shape) for name, part in self.items()
        }

    def unpack(self, buffer: jax.Array) -> dict[str, jax.Array]:
        """The sections of a device buffer, while tracing."""
        return {
            name: buffer[part.start : part.stop].reshape(part.shape) for name, part in self.items()
        }

    def pack(self, values: Mapping[str, jax.Array]) -> jax.Array:
        """The device buffer of all sections, while tracing. Raises ValueError for a wrong shape."""
        for name, part in self.items():
            if values[name].shape != part.shape:
                raise ValueError(f"{name} has shape {values[name].shape}, not {part.shape}")
        return jnp.concatenate([values[name].astype(jnp.int32).ravel() for name in self])

    def zeros(self) -> dict[str, jax.Array]:
        """Every section filled with 0, while tracing."""
        return {name: jnp.zeros(part.shape, jnp.int32) for name, part in self.items()}


@functools.cache
def result_layout(program: Program, decode_tokens: int = 1) -> Layout:
    """Sections of a step's result: sampled tokens, how many of a row are valid, `FinishCode`.

    A row yields up to `decode_tokens` tokens in one decode step.
    """
    rows = (program.rows,)
    tokens = (*rows, program.steps * decode_tokens)
    return Layout({"tokens": tokens, "num_new": rows, "finish": rows})
