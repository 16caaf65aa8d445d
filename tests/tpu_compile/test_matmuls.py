"""Products with quantized weights, and with experts, compile for real TPUs without having one.

Few cases here; `make tpu-compile` compiles all of them.
"""

import importlib.util
import itertools
import json
import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed; it exists for Linux on x86-64 only",
)
def test_weights_are_read_as_they_are() -> None:
    # Alone in a process: libtpu reads its environment once, and other tests have another one.
    run = subprocess.run(
        [sys.executable, "-m", "tests.tpu_compile.matmuls", "--quick"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout, run.stderr
    compiled = [json.loads(line) for line in run.stdout.splitlines()]
    kinds = {(one["generation"], one["codes"]) for one in compiled}
    assert kinds == set(
        itertools.product(("v5e", "v5p", "v6e"), ("int8", "float8_e4m3fn", "bfloat16"))
    )
    for one in compiled:
        assert one["launches"] == one["expected"], one
        # No weight is made floats, or laid out otherwise, in memory.
        assert 8 * one["temp_bytes"] < one["weight_bytes"], one
    assert run.returncode == 0, run.stderr
