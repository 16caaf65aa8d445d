"""Loads the native CPU kernels into the process."""

import ctypes
import functools
import logging

import jax

from jserve.pallas_kernels.native.build import library_path

_log = logging.getLogger(__name__)
_KERNELS = (
    "gated_activation",
    "grouped_matmul",
    "matmul",
    "quantized_matmul",
    "ragged_paged_attention",
    "rms_norm",
    "rotary",
)


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
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:  # it was built on another system, or is damaged
        _log.warning(
            "the native CPU kernels cannot be loaded, XLA's own code runs: %s. Delete %s and run "
            "python -m jserve.pallas_kernels.native.build",
            error,
            path,
        )
        return False
    for name in _KERNELS:
        handler = getattr(library, f"jserve_{name}")
        jax.ffi.register_ffi_target(f"jserve_{name}", jax.ffi.pycapsule(handler), platform="cpu")
    return True
