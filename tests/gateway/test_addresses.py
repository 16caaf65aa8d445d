"""Where a gateway listens: ports that cannot be, and IPv6."""

import asyncio
import json
import socket
from dataclasses import replace

import grpc.aio
import httpx
import pytest

from jserve.core.addresses import host_and_port
from jserve.core.errors import ConfigError
from jserve.gateway.addresses import check_addresses
from jserve.gateway.config import GatewayConfig
from jserve.gateway.fake_engine import FakeEngine
from jserve.gateway.grpc_server import GrpcServer
from jserve.gateway.http.app import make_app
from jserve.gateway.http.server import HttpServer
from jserve.gateway.metrics import GatewayMetrics
from jserve.proto import inference_pb2, inference_pb2_grpc
from tests.gateway.fixtures import INFO, closing, make_plane


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"http_port": 65536}, "gateway.http_port is 65536"),
        ({"http_port": -1}, "gateway.http_port is -1"),
        ({"grpc_port": 2**40}, "gateway.grpc_port is"),
        ({"http_port": 8500}, "are both 8500"),
        ({"host": ""}, "gateway.host is empty"),
    ],
)
def test_ports_that_cannot_be(fields, words):
    with pytest.raises(ConfigError, match=words):
        check_addresses(replace(GatewayConfig(), **fields))


@pytest.mark.parametrize(
    "fields", [{}, {"http_port": 0, "grpc_port": 0}, {"http_port": 65535}, {"host": "::1"}]
)
def test_ports_that_can(fields):
    check_addresses(replace(GatewayConfig(), **fields))


@pytest.mark.parametrize(
    ("host", "joined"),
    [("127.0.0.1", "127.0.0.1:1"), ("localhost", "localhost:1"), ("::1", "[::1]:1")],
)
def test_host_and_port_as_urls_have_them(host, joined):
    assert host_and_port(host, 1) == joined


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.skipif(not _has_ipv6(), reason="this machine has no IPv6 loopback")
def test_both_servers_listen_on_ipv6():
    async def main() -> None:
        engine = FakeEngine(INFO)
        plane = make_plane(engine, host="::1")
        metrics = GatewayMetrics(clock=plane.clock)
        http = HttpServer(make_app(plane, metrics, version="1"), host="::1", port=0, drain_s=1)
        rpc = GrpcServer(plane, metrics)
        await http.start()
        await rpc.start()
        async with (
            closing(engine),
            httpx.AsyncClient(base_url=f"http://{host_and_port('::1', http.port)}") as client,
            grpc.aio.insecure_channel(host_and_port("::1", rpc.port)) as channel,
        ):
            answer = await client.get("/v1/models")
            assert json.loads(answer.text)["data"][0]["id"] == INFO.model
            stub = inference_pb2_grpc.InferenceStub(channel)
            models = await stub.ListModels(inference_pb2.ListModelsRequest())
            assert models.models[0].id == INFO.model
        await rpc.stop(0)
        await http.stop()

    asyncio.run(main())
