"""`Host` names this server, and no log line is made by a client."""

import logging
import re
import socket

import httpx
import pytest

from jserve.core.logs import LogFormat, StructuredFormatter
from tests.gateway.http.http_serving import Served, serving


@pytest.fixture(scope="module")
def served():
    with serving() as running:
        yield running


def ask(served: Served, *hosts: str, version: str = "1.1", path: str = "/v1/models") -> int:
    """The status of a GET with these Host headers."""
    lines = "".join(f"Host: {host}\r\n" for host in hosts)
    request = f"GET {path} HTTP/{version}\r\n{lines}Connection: close\r\n\r\n"
    with socket.create_connection(("127.0.0.1", served.port), timeout=5) as raw:
        raw.sendall(request.encode())
        return int(raw.makefile("rb").readline().split()[1])


LOCAL = ["localhost", "LOCALHOST:80", "localhost.", "127.0.0.1:1", "[::1]:8000", "x", "a.localhost",
         "10.1.2.3", socket.gethostname()]  # fmt: skip
STRANGE = ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example",
           "evil.example.", "notlocalhost.com", "", " ", "a b", "localhost/", "[::1", "u@localhost",
           "[evil.example]", "localhost:80:80", "localhost\x01"]  # fmt: skip


@pytest.mark.parametrize("host", LOCAL)
def test_a_local_name_is_allowed(served, host):
    assert ask(served, host) == 200


@pytest.mark.parametrize("host", STRANGE)
@pytest.mark.parametrize("path", ["/v1/models", "/health", "/metrics"])
def test_another_name_is_refused(served, host, path):
    assert ask(served, host, path=path) == 400


def test_two_hosts_or_none_are_refused(served):
    assert ask(served) == 400
    assert ask(served, "localhost", "localhost") == 400
    assert ask(served, "localhost", "evil.example") == 400
    assert ask(served, version="1.0") == 200  # older than the header
    assert ask(served, "localhost", "localhost", version="1.0") == 400
    error = httpx.get(f"{served.url}/v1/models", headers={"host": "evil.example"}).json()["error"]
    assert error["code"] == "invalid_host"
    assert "gateway.allowed_hosts" in error["message"]


def test_names_are_added():
    with serving(allowed_hosts=("api.example", "*.Cluster.example")) as served:
        for host in ("api.example", "API.example:443", "a.cluster.example", "a.b.cluster.example"):
            assert ask(served, host) == 200
        assert ask(served, "localhost") == 200
        for host in ("evil.example", "x.api.example", "cluster.example", "acluster.example"):
            assert ask(served, host) == 400
    with serving(allowed_hosts=("*",)) as served:
        assert ask(served, "evil.example") == 200
        assert ask(served, "a", "b") == 400


def test_where_other_machines_ask_every_name_is_allowed():
    with serving(host="0.0.0.0") as served:
        assert ask(served, "api.example") == 200
        assert ask(served) == 400
    with serving(host="0.0.0.0", allowed_hosts=("api.example",)) as served:
        assert ask(served, "api.example") == 200
        assert ask(served, "evil.example") == 400


@pytest.mark.parametrize("kind", LogFormat)
def test_a_path_forges_no_log_line(caplog, kind):
    # A server of its own: one that others have asked may still log an answer to them.
    with caplog.at_level(logging.DEBUG), serving() as served:
        forged = "%0a2026-01-01T00:00:00.000Z%20ERROR%20root%20FORGED%1b[2J%c2%85%e2%80%a8"
        for path in (f"/{forged}", "/v1/%0d%0aFORGED", "/a%20200%20in%200.1%20ms"):
            with socket.create_connection(("127.0.0.1", served.port), timeout=5) as raw:
                raw.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
                raw.makefile("rb").read()
    formatter = StructuredFormatter(kind)
    lines = [formatter.format(record) for record in caplog.records if record.name.endswith("edge")]
    assert len(lines) == 3
    assert all(line.isprintable() for line in lines)
    assert all(len(re.findall(r" \d+ in [\d.]+ ms", line)) == 1 for line in lines)
