"""Products with quantized weights compile for real TPUs on a machine without one.

Few cases here; `make tpu-compile` compiles all of them.
"""

import importlib.util
import json
import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed; it exists for Linux on x86-64 only",
)
def test_codes_are_read_as_they_are() -> None:
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
    assert kinds == {(g, c) for g in ("v5e", "v5p", "v6e") for c in ("int8", "float8_e4m3fn")}
    for one in compiled:
        assert one["launches"] == one["weights"], one
        # No weight is made floats, or laid out otherwise, in memory.
        assert 8 * one["temp_bytes"] < one["weight_bytes"], one
    assert run.returncode == 0, run.stderr
