"""Weights as the native product reads them: panels of outputs, side by side for each input."""

from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Float, Int

PANEL = 32  # outputs side by side


@dataclass(frozen=True, slots=True)
class PanelMatrix:
    """A weight [out, in] in panels; the last one is filled up with zeros."""

    values: Float[jax.Array, "panels in_dim 32"]
    out_dim: int

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight: [out, in]."""
        return self.out_dim, self.values.shape[1]


def panel_shape(shape: tuple[int, int]) -> tuple[int, int, int]:
    """Of the panels of a weight [out, in]."""
    return -(-shape[0] // PANEL), shape[1], PANEL


def to_panels(weight: np.ndarray) -> Float[np.ndarray, "panels in_dim 32"]:
    """The panels of a weight [out, in], on the host."""
    out_dim, in_dim = weight.shape
    panels = np.empty(panel_shape((out_dim, in_dim)), weight.dtype)
    for panel, values in enumerate(panels):
        rows = weight[panel * PANEL : (panel + 1) * PANEL]
        values[:, : len(rows)] = rows.T
        values[:, len(rows) :] = 0
    return panels


def take_rows(
    matrix: PanelMatrix, rows: Int[jax.Array, " rows"]
) -> Float[jax.Array, "rows in_dim"]:
    """Some rows of the weight: an embedding's lookup."""
    return matrix.values[rows // PANEL, :, rows % PANEL]
