"""Runs the quick part of a module of this folder, which `make test` compiles."""

import importlib.util
import json
import subprocess
import sys
from typing import Any

import pytest

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed; it exists for Linux on x86-64 only",
)


def compile_quickly(module: str) -> list[dict[str, Any]]:
    """The module's report on each program; fails if it ended early or found a fault."""
    # Alone in a process: libtpu reads its environment once, and other tests have another one.
    run = subprocess.run(
        [sys.executable, "-m", f"tests.tpu_compile.{module}", "--quick"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]
