"""Which implementation of an op runs: chosen once, at start-up, and logged."""

import enum


class Backend(enum.Enum):
    """The implementations an op may have."""

    REFERENCE = "reference"  # plain jnp, defines correct; runs anywhere
    CPU = "cpu"  # XLA, made for CPU


def backend_for(platform: str) -> Backend:
    """The best backend there is for a JAX platform name."""
    return Backend.CPU if platform == "cpu" else Backend.REFERENCE
