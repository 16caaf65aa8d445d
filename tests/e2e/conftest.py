"""One running server for the tests that leave it as they found it."""

from collections.abc import Iterator

import pytest

from tests.e2e.server import Server, serving


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(
        "configs/tiny_random.py", tmp_path_factory.mktemp("e2e") / "server.log"
    ) as running:
        yield running
