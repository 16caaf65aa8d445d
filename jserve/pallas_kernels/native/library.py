"""Loads the native CPU kernels into the process and calls them."""

import ctypes
import functools
import logging

import jax

from jserve.pallas_kernels.native.build import library_path

_log = logging.getLogger(__name__)
_KERNELS = ("matmul", "quantized_matmul", "ragged_paged_attention", "rms_norm")


@functools.cache
def is_loaded() -> bool:
    """Whether the kernels can be called; the first call loads them, and logs if it cannot."""
    path = library_path()
    if not path.is_file():
        _log.warning(
            "the native CPU kernels are not built (python -m jserve.pallas_kernels.native.build); "
            "XLA's own code runs"
        )
        return False
    library = ctypes.CDLL(str(path))
    for name in _KERNELS:
        handler = getattr(library, f"jserve_{name}")
        jax.ffi.register_ffi_target(f"jserve_{name}", jax.ffi.pycapsule(handler), platform="cpu")
    return True
