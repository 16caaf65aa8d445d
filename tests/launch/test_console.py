"""What a server shows when it is ready: addresses and a command that works."""

import io
import json
import re

import pytest

from jserve.gateway.fake_engine import FakeEngine
from jserve.launch.console import Console, show_summary
from jserve.proto.engine_status import Ready
from tests.gateway.fixtures import INFO, make_plane


def _shown(*, with_template: bool = True, **config: object) -> str:
    plane = make_plane(FakeEngine(INFO), **{"http_port": 8000, "grpc_port": 8500, **config})
    if not with_template:
        plane.chat_template = None
    stream = io.StringIO()
    show_summary(Console(stream), plane, Ready("127.0.0.1:1"))
    return stream.getvalue()


@pytest.mark.parametrize("with_template", [True, False])
def test_the_command_asks_for_the_most_likely_answer(with_template: bool) -> None:
    text = _shown(with_template=with_template)
    body = json.loads(re.findall("-d '(.*)'", text)[0])
    assert body["temperature"] == 0
    assert ("messages" in body) == with_template


@pytest.mark.parametrize(
    ("host", "shown"),
    [("127.0.0.1", "127.0.0.1"), ("::1", "[::1]"), ("::", "[::1]"), ("0.0.0.0", "127.0.0.1")],
)
def test_addresses_are_those_to_send_to(host: str, shown: str) -> None:
    text = _shown(host=host)
    assert f"http://{shown}:8000/v1/" in text
    assert f" {shown}:8500\n" in text
