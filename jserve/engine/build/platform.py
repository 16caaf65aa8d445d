"""Pins the platform of JAX before it is imported; raises the limits of the process."""

import logging
import os
import resource
import sys

from jserve.engine.build.chips import GPU_SHARE
from jserve.engine.config import Platform, PlatformConfig

_log = logging.getLogger(__name__)

# One place for compiler flags. Each says what it is for.
_XLA_FLAGS: dict[Platform, tuple[str, ...]] = {
    Platform.CPU: (),
    Platform.GPU: (
        # Overlaps collectives with compute where a model spans several devices.
        "--xla_gpu_enable_latency_hiding_scheduler=true",
    ),
    Platform.TPU: (),
}


def pin(config: PlatformConfig) -> None:
    """Fixes JAX's backend, so that an installed plugin for another one never surprises.

    Must run before JAX is imported. Flags that the environment already has come last and win.
    """
    if "jax" in sys.modules:
        raise RuntimeError("jax was imported before its platform was pinned")
    inherited = os.environ.get("XLA_FLAGS", "").split()
    own = (*_XLA_FLAGS[config.backend], *config.xla_flags)
    # Without those of a parent that was pinned, too: compiled programs are kept by their flags.
    flags = (*(flag for flag in own if flag not in inherited), *inherited)
    os.environ["JAX_PLATFORMS"] = config.jax_platforms
    os.environ["XLA_FLAGS"] = " ".join(flags)
    # JAX takes three quarters of a GPU unless told; an engine has it to itself.
    if config.backend is Platform.GPU and "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", str(GPU_SHARE))
    fields = {"backend": config.backend.value, "xla_flags": " ".join(flags)}
    _log.info("platform pinned", extra=fields)


def raise_file_limit() -> None:
    """Lets the process hold as many open connections as the system allows it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        wanted = hard if hard != resource.RLIM_INFINITY else 1 << 20
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        except (ValueError, OSError) as error:  # macOS refuses its own hard limit
            _log.warning("open file limit stays", extra={"limit": soft, "error": str(error)})
