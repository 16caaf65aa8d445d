"""Rotary position embeddings (Su et al., 2021): frequencies and tables of every kind."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jserve.core.model_spec import ModelSpec, RopeScaling, RopeScalingKind


class RopeTables(NamedTuple):
    """Cosines and sines of the step's tokens, shared by all layers of one kind."""

    cos: Float[Array, "tokens half_dim"]
    sin: Float[Array, "tokens half_dim"]


@dataclass(frozen=True, slots=True)
class Rope:
    """A kind of rotary embedding; equal kinds share their tables."""

    head_dim: int
    theta: float
    scaling: RopeScaling | None = None

    def tables(self, positions: Int[Array, " tokens"]) -> RopeTables:
        """Float32 tables for absolute `positions`."""
        where = positions.astype(jnp.float32)[:, None]
        if self.scaling is not None and self.scaling.kind is RopeScalingKind.DYNAMIC:
            angles = where * self._dynamic_frequencies(positions)
        else:
            angles = where * self.frequencies()[None, :]
        return RopeTables(jnp.cos(angles), jnp.sin(angles))

    def frequencies(self) -> np.ndarray:
        """Radians per position, [head_dim / 2] float32; dynamic scaling starts from them, too.

        Computed on the host, rounded to float32 after every operation as the references do: at
        position 10⁴ one unit in the last place of a frequency already shows in the logits.
        """
        exponents = _exponents(self.head_dim)
        powers = np.float64(np.float32(self.theta)) ** exponents.astype(np.float64)
        plain = np.float32(1.0) / powers.astype(np.float32)
        if self.scaling is None or self.scaling.kind is RopeScalingKind.DYNAMIC:
            return plain
        if self.scaling.kind is RopeScalingKind.LINEAR:
            return plain / np.float32(self.scaling.factor)
        return _llama3(plain, self.scaling)

    def _dynamic_frequencies(
        self, positions: Int[Array, " tokens"]
    ) -> Float[Array, "tokens half_dim"]:
        """NTK-aware frequencies of a sequence that ends at the token itself.

        A token's rotation then depends on its own position only, so chunking and batching cannot
        change it; within the trained context this is plain RoPE.
        """
        assert self.scaling is not None
        trained = self.scaling.original_max_position
        stretch = jnp.maximum(positions + 1, trained).astype(jnp.float32) / np.float32(trained)
        growth = 1.0 + self.scaling.factor * (stretch - 1.0)  # exactly 1 in the trained context
        # theta' = theta · growth^(d/(d−2)), hence 1/theta'^e = 1/theta^e · growth^(−e·d/(d−2)).
        exponents = _exponents(self.head_dim) * (self.head_dim / (self.head_dim - 2))
        shrink = jnp.exp(-jnp.log(growth)[:, None] * exponents.astype(np.float32)[None, :])
        return jnp.asarray(self.frequencies())[None, :] * shrink


def rope_for_layer(spec: ModelSpec, layer: int) -> Rope:
    """The kind of rotary embedding that a layer uses."""
    if spec.is_local(layer) and spec.local_rope_theta is not None:
        return Rope(spec.head_dim, spec.local_rope_theta)
    return Rope(spec.head_dim, spec.rope_theta, spec.rope_scaling)


def _exponents(head_dim: int) -> np.ndarray:
    return np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)


def _llama3(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Llama 3.1 scaling: long wavelengths are stretched, short ones kept, the rest blended."""
    factor, trained = np.float32(scaling.factor), scaling.original_max_position
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    wavelengths = np.float32(2 * math.pi) / frequencies
    blend = (np.float32(trained) / wavelengths - np.float32(low)) / np.float32(high - low)
    blended = (1 - blend) * frequencies / factor + blend * frequencies
    stretched = np.where(wavelengths > trained / low, frequencies / factor, blended)
    return np.where(wavelengths < trained / high, frequencies, stretched).astype(np.float32)
