"""Which implementation of an op runs: chosen once, at start-up, and logged."""

import enum
import logging

_log = logging.getLogger(__name__)


class Backend(enum.Enum):
    """The implementations an op may have."""

    REFERENCE = "reference"  # plain jnp, defines correct; runs anywhere
    CPU = "cpu"  # XLA loops, made for CPU; bounded memory anywhere


def backend_for(platform: str) -> Backend:
    """The best backend there is for a JAX platform name."""
    if platform != "cpu":
        _log.warning("there is no attention kernel for %s yet; the CPU's XLA loops run", platform)
    return Backend.CPU
