"""JAX's platform is fixed before JAX starts, in a process of its own."""

import json
import os
import subprocess
import sys

import pytest

from jserve.config import load, override
from jserve.core.errors import ConfigError

_PROGRAM = """
import json, os, resource, sys
from jserve.engine.config import Platform, PlatformConfig
from jserve.engine.build import platform
platform.pin(PlatformConfig(backend=Platform(sys.argv[1]), xla_flags=("--xla_a=1",)))
platform.raise_file_limit()
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
print(json.dumps({
    "platforms": os.environ["JAX_PLATFORMS"],
    "flags": os.environ["XLA_FLAGS"].split(),
    "jax": "jax" in sys.modules,
    "limit": soft == hard,
    "gpu_share": os.environ.get("XLA_CLIENT_MEM_FRACTION"),
}))
"""


def _run(backend: str, inherited: str = "--xla_b=2") -> dict:
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, backend],
        env=os.environ | {"JAX_PLATFORMS": "made_up", "XLA_FLAGS": inherited},
        capture_output=True,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("backend", "platforms"), [("cpu", "cpu"), ("gpu", "cuda,cpu"), ("tpu", "tpu,cpu")]
)
def test_platform_and_flags_are_set_without_starting_jax(backend: str, platforms: str) -> None:
    said = _run(backend)
    assert said["platforms"] == platforms
    assert said["flags"][-2:] == ["--xla_a=1", "--xla_b=2"]
    assert not said["jax"]
    assert said["limit"]
    assert said["gpu_share"] == ("0.92" if backend == "gpu" else None)


def test_the_flags_of_a_pinned_parent_are_not_repeated() -> None:
    flags = _run("gpu")["flags"]
    assert _run("gpu", " ".join(flags))["flags"] == flags


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(ConfigError, match="one of cpu, gpu, tpu"):
        override(load("configs/tiny_random.py"), ["platform.backend=npu"])
