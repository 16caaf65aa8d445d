"""The choice of an op's implementation: made once, at start-up, and logged."""

import enum
import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp

from jserve.pallas_kernels.native import library

_log = logging.getLogger(__name__)


class Backend(enum.Enum):
    """The implementations an op may have, of which the reference defines correct."""

    REFERENCE = "reference"  # plain jnp; runs anywhere
    CPU = "cpu"  # XLA loops made for CPU; memory is bounded anywhere
    NATIVE = "native"  # C++ on CPU, where it was built
    TPU = "tpu"  # Pallas for attention and quantized matmuls, XLA for the rest
    GPU = "gpu"  # Pallas for attention, quantized and grouped matmuls on Hopper, XLA for the rest


# Multiprocessors of Hopper GPUs, by the beginning of JAX's name for them. The kernels need wgmma
# and Hopper's shared memory.
_HOPPER = {
    "NVIDIA H100": 132,
    "NVIDIA H100 PCIe": 114,
    "NVIDIA H200": 132,
    "NVIDIA H800": 132,
    "NVIDIA H800 PCIe": 114,
    "NVIDIA H20": 78,
    "NVIDIA GH200": 132,
}
GPU_HEAD_DIMS = (64, 128, 256)
GPU_PAGE_SIZES = (64, 128)


def implementations(
    reference: Callable[..., Any],
    *,
    cpu: Callable[..., Any] | None = None,
    native: Callable[..., Any],
    tpu: Callable[..., Any] | None = None,
    gpu: Callable[..., Any] | None = None,
) -> Mapping[Backend, Callable[..., Any]]:
    """The implementation of an op on every backend: the reference where there is no other."""
    return {
        Backend.REFERENCE: reference,
        Backend.CPU: cpu or reference,
        Backend.NATIVE: native,
        Backend.TPU: tpu or reference,
        Backend.GPU: gpu or reference,
    }


def hopper_multiprocessors(device_kind: str) -> int | None:
    """Number of multiprocessors of a Hopper GPU, or None for another device.

    The longest name in the table with which `device_kind` begins counts.
    """
    names = [name for name in _HOPPER if device_kind.startswith(name)]
    return _HOPPER[max(names, key=len)] if names else None


def backend_for(
    platform: str,
    dtype: jnp.dtype,
    num_devices: int = 1,
    *,
    device_kind: str,
    head_dim: int = GPU_HEAD_DIMS[0],
    page_size: int = GPU_PAGE_SIZES[0],
) -> Backend:
    """Chooses the best backend for a JAX platform, a model's dtype and number of devices.

    `device_kind` (JAX's name of the device), `head_dim` and `page_size` matter on GPUs only.
    """
    if platform == "tpu":
        return Backend.TPU
    if platform in ("gpu", "cuda"):
        missing = _gpu_misses(dtype, device_kind, head_dim, page_size)
        if not missing:
            return Backend.GPU
        _log.warning("attention by XLA's loops, slow on a GPU: %s", "; ".join(missing))
        return Backend.CPU
    if platform != "cpu":
        _log.warning("there is no attention kernel for %s; the CPU's XLA loops run", platform)
        return Backend.CPU
    if dtype not in (jnp.float32, jnp.bfloat16):
        _log.warning("the native CPU kernels do not know %s; XLA's own code runs", dtype)
        return Backend.CPU
    if num_devices > 1:
        _log.warning("the native CPU kernels run on one device; XLA's own code runs")
        return Backend.CPU
    return Backend.NATIVE if library.is_loaded() else Backend.CPU


def _gpu_misses(dtype: jnp.dtype, device_kind: str, head_dim: int, page_size: int) -> list[str]:
    """Reasons, in words, why the kernel for Hopper cannot run; none if it can."""
    missing = []
    if hopper_multiprocessors(device_kind) is None:
        missing.append(f"the kernel needs a Hopper GPU, not {device_kind or 'an unknown one'}")
    if dtype != jnp.bfloat16:
        missing.append(f"it computes in bfloat16, the model in {dtype}")
    if head_dim not in GPU_HEAD_DIMS:
        missing.append(f"head_dim {head_dim} is none of {GPU_HEAD_DIMS}")
    if page_size not in GPU_PAGE_SIZES:
        missing.append(f"engine.page_size {page_size} is none of {GPU_PAGE_SIZES}")
    return missing
