"""Which implementation of an op runs: chosen once, at start-up, and logged."""

import enum
import logging

import jax.numpy as jnp

from jserve.pallas_kernels.native import library

_log = logging.getLogger(__name__)


class Backend(enum.Enum):
    """The implementations an op may have."""

    REFERENCE = "reference"  # plain jnp, defines correct; runs anywhere
    CPU = "cpu"  # XLA loops, made for CPU; bounded memory anywhere
    NATIVE = "native"  # C++ on CPU, where it was built
    TPU = "tpu"  # attention and quantized products in Pallas; XLA's own code does the rest
    GPU = "gpu"  # likewise, on Hopper


def backend_for(platform: str, dtype: jnp.dtype, num_devices: int = 1) -> Backend:
    """The best backend there is for a JAX platform name, a model's dtype and its devices."""
    if platform == "tpu":
        return Backend.TPU
    if platform != "cpu":
        _log.warning("there is no attention kernel for %s yet; the CPU's XLA loops run", platform)
        return Backend.CPU
    if dtype not in (jnp.float32, jnp.bfloat16):
        _log.warning("the native CPU kernels do not know %s; XLA's own code runs", dtype)
        return Backend.CPU
    if num_devices > 1:
        _log.warning("the native CPU kernels run on one device; XLA's own code runs")
        return Backend.CPU
    return Backend.NATIVE if library.is_loaded() else Backend.CPU
