"""The layout of weights for the native matmul: panels of outputs, side by side for each input."""

from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Float, Int

PANEL = 32  # outputs side by side


@dataclass(frozen=True, slots=True)
class PanelMatrix:
    """A weight [out, in], or a stack of weights, in panels; zeros fill up the last panel."""

    values: Float[jax.Array, "*experts panels in_dim 32"]
    out_dim: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight [out, in], or of the stack [experts, out, in]."""
        return *self.values.shape[:-3], self.out_dim, self.values.shape[-2]


def panel_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of the panels of a weight [out, in] or of a stack of weights."""
    return *shape[:-2], -(-shape[-2] // PANEL), shape[-1], PANEL


def to_panels(
    weight: Float[np.ndarray, "*experts out_dim in_dim"],
) -> Float[np.ndarray, "*experts panels in_dim 32"]:
    """Lays out a weight, or a stack of weights, in panels, on the host."""
    panels = np.empty(panel_shape(weight.shape), weight.dtype)
    for *expert, panel in np.ndindex(*panels.shape[:-2]):
        rows = weight[(*expert, slice(panel * PANEL, (panel + 1) * PANEL))]
        values = panels[(*expert, panel)]
        values[:, : len(rows)] = rows.T
        values[:, len(rows) :] = 0
    return panels


def take_rows(
    matrix: PanelMatrix, rows: Int[jax.Array, " rows"]
) -> Float[jax.Array, "rows in_dim"]:
    """Looks up rows of the weight, 0 ≤ row < out_dim, as an embedding does."""
    return matrix.values[rows // PANEL, :, rows % PANEL]
