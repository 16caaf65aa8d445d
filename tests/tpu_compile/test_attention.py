"""Attention compiles for real TPUs on a machine without one: Mosaic accepts the kernel.

Few programs here; `make tpu-compile` compiles all of them.
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
def test_pages_are_updated_in_place_by_one_launch() -> None:
    # Alone in a process: libtpu reads its environment once, and other tests have another one.
    run = subprocess.run(
        [sys.executable, "-m", "tests.tpu_compile.programs", "--quick"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout, run.stderr
    programs = [json.loads(line) for line in run.stdout.splitlines()]
    assert {program["generation"] for program in programs} == {"v5e", "v5p", "v6e"}
    for program in programs:
        assert program["launches"] == 1, program
        assert program["alias_bytes"] >= program["page_bytes"], program
        # Room for the step's own queries, keys and values, not for a copy of the pages.
        assert 8 * program["temp_bytes"] < program["page_bytes"], program
    assert run.returncode == 0, run.stderr
