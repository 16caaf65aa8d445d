"""Compiled programs that engines of different files share."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def programs_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the `cache_folder` of engines, one for all processes of a run."""
    own = tmp_path_factory.getbasetemp()
    root = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own
    return root / "engine_programs"
