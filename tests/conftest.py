"""Settings that every test shares: JAX on the CPU, strict about dtypes and ranks."""

import os

from hypothesis import HealthCheck, settings

# Set before anything imports JAX, and not through jax.config: unit tests never import it.
# Eight devices serve the sharding tests; arrays still land on the first one by default.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"

# A loaded machine is slow, not wrong.
settings.register_profile("jserve", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("jserve")
