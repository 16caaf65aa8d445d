"""What every client is told: addresses and names of models, by environment variables.

These tests run where jserve is not installed; see `__main__.py`.
"""

import os
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Scripted:
    """A server with a key, whose model reasons, speaks and calls `weather` in every answer."""

    url: str
    model: str
    key: str


@pytest.fixture(scope="session")
def url() -> str:
    return os.environ["WORLD_URL"]


@pytest.fixture(scope="session")
def model() -> str:
    return os.environ["WORLD_MODEL"]


@pytest.fixture(scope="session")
def scripted() -> Scripted:
    return Scripted(*(os.environ[f"WORLD_SCRIPTED_{name}"] for name in ("URL", "MODEL", "KEY")))
