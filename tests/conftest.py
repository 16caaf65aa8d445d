"""Settings that every test shares: JAX on the CPU, strict about dtypes and ranks."""

import os
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from jaxtyping import config

# Set before anything imports JAX, and not through jax.config: unit tests never import it.
# Eight devices serve the sharding tests; arrays still land on the first one by default.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
# Where an operation was written is in programs only to be shown; it takes a twentieth of the time.
os.environ["JAX_INCLUDE_FULL_TRACEBACKS_IN_LOCATIONS"] = "0"

# XLA compiles in a quarter of the time, to code that is right and slow. Its bits are others.
_UNOPTIMIZED = " --xla_backend_optimization_level=0"
if version("jaxlib") < "0.11":  # later ones have the slower emitters only
    _UNOPTIMIZED += " --xla_cpu_use_fusion_emitters=false"

# A loaded machine is slow, not wrong.
settings.register_profile("jserve", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("jserve")

# The longest come first, so that the processes of a parallel run end together. The first of all
# compiles the programs of the servers that the rest of e2e starts.
_FIRST = (
    "e2e/test_real_model.py",
    "e2e/test_clients.py",
    "engine",
    "model",
    "pallas_kernels",
    "tpu_compile",
    "e2e",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--optimized", action="store_true", help="only the tests that are marked 'optimized'"
    )
    parser.addoption(
        "--unoptimized",
        action="store_true",
        help="all tests but those marked 'optimized', with programs that XLA does not optimize",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Sets the flags of XLA before JAX reads them."""
    if config.getoption("unoptimized"):
        os.environ["XLA_FLAGS"] += _UNOPTIMIZED


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leaves out files without a marked test, since importing them all takes long."""
    if config.getoption("optimized") and collection_path.suffix == ".py":
        return "mark.optimized" not in collection_path.read_text() or None
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Selects one part of the suite, and orders whole files; no test depends on the order."""
    for part, wanted in (("optimized", True), ("unoptimized", False)):
        if config.getoption(part):
            marked = {item for item in items if item.get_closest_marker("optimized")}
            config.hook.pytest_deselected(items=[it for it in items if (it in marked) != wanted])
            items[:] = [item for item in items if (item in marked) == wanted]
    root = Path(__file__).parent

    def place(item: pytest.Item) -> int:
        path = item.path.relative_to(root)
        found = (i for i, first in enumerate(_FIRST) if path.is_relative_to(first))
        return next(found, len(_FIRST))

    items.sort(key=place)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Leaves annotations unchecked, as users have it, to see what the code itself refuses."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)
