"""Accelerators that `jserve plan` knows, and the memory a program may use on each."""

from dataclasses import dataclass

from jserve.core.errors import ConfigError
from jserve.engine.config import Platform

GPU_SHARE = 0.92  # share of a GPU's memory for JAX; the rest is for CUDA and its libraries
_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Chip:
    """One JAX device. A v5p chip's two cores are one device, so a slice `v5p-8` has four."""

    name: str
    platform: Platform
    device_kind: str  # JAX's name of it
    usable_bytes: int  # memory left by runtime and compiler


# TPU: the limit that the compiler itself names when a program is too large for the chip.
# GPU: the memory that the driver shows, times the share that the launcher gives to JAX.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", Platform.TPU, "TPU v5 lite", int(15.75 * _GIB)),
        Chip("v5p", Platform.TPU, "TPU v5", int(95.74 * _GIB)),
        Chip("v6e", Platform.TPU, "TPU v6 lite", int(31.25 * _GIB)),
        Chip("h100", Platform.GPU, "NVIDIA H100", int(79.6 * _GIB * GPU_SHARE)),
        Chip("h200", Platform.GPU, "NVIDIA H200", int(140.4 * _GIB * GPU_SHARE)),
    )
}


def find_chip(name: str) -> Chip:
    """The chip called `name`. Raises ConfigError that lists the known names."""
    if name not in CHIPS:
        raise ConfigError(f"platform.chip is {name!r}; it must be one of {', '.join(CHIPS)}")
    return CHIPS[name]
