"""What every client is told: the server's address and the model's name.

These tests run where jserve is not installed; see `__main__.py`.
"""

import os

import pytest


@pytest.fixture(scope="session")
def url() -> str:
    return os.environ["WORLD_URL"]


@pytest.fixture(scope="session")
def model() -> str:
    return os.environ["WORLD_MODEL"]
