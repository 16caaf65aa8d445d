"""Accelerators that plans can be made for without having one: what a program may use of them."""

from dataclasses import dataclass

from jserve.core.errors import ConfigError

GPU_SHARE = 0.92  # of its memory, that JAX may take; the rest is for CUDA and its libraries
_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Chip:
    """One JAX device. A v5p chip's two cores are one device, so a slice `v5p-8` has four."""

    name: str
    platform: str  # gpu or tpu
    device_kind: str  # as JAX calls it
    usable_bytes: int  # of its memory, after what runtime and compiler keep for themselves


# TPU: the limit that the compiler itself names when a program is too large for the chip.
# GPU: the memory that the driver shows, times the share that the launcher gives to JAX.
CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", "tpu", "TPU v5 lite", int(15.75 * _GIB)),
        Chip("v5p", "tpu", "TPU v5", int(95.74 * _GIB)),
        Chip("v6e", "tpu", "TPU v6 lite", int(31.25 * _GIB)),
        Chip("h100", "gpu", "NVIDIA H100", int(79.6 * _GIB * GPU_SHARE)),
        Chip("h200", "gpu", "NVIDIA H200", int(140.4 * _GIB * GPU_SHARE)),
    )
}


def chip_of(name: str) -> Chip:
    """The chip of that name. Raises ConfigError with the names there are."""
    if name not in CHIPS:
        raise ConfigError(f"platform.chip is {name!r}; it must be one of {', '.join(CHIPS)}")
    return CHIPS[name]
