"""TLS of both front ends, with certificates that are renewed while the server runs."""

import asyncio
import logging
import socket
import ssl
import subprocess
from pathlib import Path

import grpc
import grpc.aio
import httpx
import pytest
import uvloop
from starlette.responses import PlainTextResponse

from jserve.core.errors import ConfigError
from jserve.gateway.config import GatewayConfig
from jserve.gateway.fake_engine import FakeEngine
from jserve.gateway.grpc_server import GrpcServer
from jserve.gateway.http.server import HttpServer
from jserve.gateway.metrics import GatewayMetrics
from jserve.gateway.tls import TlsFiles
from jserve.proto import inference_pb2, inference_pb2_grpc
from tests.gateway.certificates import Pair, make_pair
from tests.gateway.fixtures import INFO, closing, make_plane


def common_name(port: int, pair: Pair, name: str | None) -> str:
    """The subject that the server shows to a new connection that trusts `pair` alone."""
    context = ssl.create_default_context(cafile=str(pair.certificate))
    context.check_hostname = name is not None
    with (
        socket.create_connection(("127.0.0.1", port), timeout=5) as raw,
        context.wrap_socket(raw, server_hostname=name) as connection,
    ):
        subject = connection.getpeercert()["subject"]
    return dict(part[0] for part in subject)["commonName"]


def test_https_follows_the_files(tmp_path, caplog):
    served, other = make_pair(tmp_path, "first"), make_pair(tmp_path, "second")
    tls = TlsFiles(served.certificate, served.key)

    async def main():
        app = PlainTextResponse("hello")
        server = HttpServer(app, host="127.0.0.1", port=0, drain_s=1.0, tls=tls)
        await server.start()
        url = f"https://localhost:{server.port}/"
        verify = ssl.create_default_context(cafile=str(served.certificate))
        async with httpx.AsyncClient(verify=verify) as http:
            assert (await http.get(url)).text == "hello"
            assert await asyncio.to_thread(common_name, server.port, served, "localhost") == "first"
            # A renewal that is half done, or wrong, changes nothing.
            served.certificate.write_text("half a certif")
            assert await asyncio.to_thread(common_name, server.port, first, None) == "first"
            served.replace(other)
            for name in ("localhost", None):  # with and without the server's name in the hello
                assert await asyncio.to_thread(common_name, server.port, other, name) == "second"
            assert (await http.get(url)).text == "hello"  # the connection that was there stays
        with pytest.raises(httpx.RemoteProtocolError):
            await asyncio.to_thread(httpx.get, f"http://127.0.0.1:{server.port}/")
        await server.stop()

    first = Pair(tmp_path / "kept.crt", served.key)
    first.certificate.write_bytes(served.certificate.read_bytes())
    with caplog.at_level(logging.INFO, "jserve.gateway.tls"):
        asyncio.run(main())
    said = [record.getMessage() for record in caplog.records]
    assert sum("stays as it is" in message for message in said) == 1
    assert said[-1] == "the TLS certificate was read anew"


def test_every_connection_is_answered_under_uvloop(tmp_path):
    """A client of TLS 1.3 sends its request with the last message of the handshake."""
    pair = make_pair(tmp_path, "first")

    def ask(port: int) -> str:
        verify = ssl.create_default_context(cafile=str(pair.certificate))
        return httpx.get(f"https://localhost:{port}/", verify=verify).text

    async def main():
        tls = TlsFiles(pair.certificate, pair.key)
        app = PlainTextResponse("alive")
        server = HttpServer(app, host="127.0.0.1", port=0, drain_s=1.0, tls=tls)
        await server.start()
        texts = await asyncio.gather(*(asyncio.to_thread(ask, server.port) for _ in range(30)))
        assert texts == ["alive"] * 30
        await server.stop()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())


def test_grpc_follows_the_files(tmp_path):
    served, other = make_pair(tmp_path, "first"), make_pair(tmp_path, "second")

    async def models(port: int, pem: bytes) -> str:
        credentials = grpc.ssl_channel_credentials(pem)
        async with grpc.aio.secure_channel(f"localhost:{port}", credentials) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            answer = await stub.ListModels(inference_pb2.ListModelsRequest(), timeout=5)
            return answer.models[0].id

    async def main():
        engine = FakeEngine(INFO)
        plane = make_plane(engine, tls_cert=str(served.certificate), tls_key=str(served.key))
        server = GrpcServer(plane, GatewayMetrics(clock=plane.clock))
        await server.start()
        async with closing(engine):
            before = served.certificate.read_bytes()
            assert await models(server.port, before) == "tiny"
            served.replace(other)
            assert await models(server.port, other.certificate.read_bytes()) == "tiny"
            with pytest.raises(grpc.aio.AioRpcError):
                await models(server.port, before)
        await server.stop(0)

    asyncio.run(main())


def test_what_is_wrong_with_the_files_is_named(tmp_path):
    pair, other = make_pair(tmp_path, "a"), make_pair(tmp_path, "b")
    empty = tmp_path / "empty.pem"
    empty.write_text("")
    locked = tmp_path / "locked.key"
    command = f"openssl ec -in {pair.key} -out {locked} -aes128 -passout pass:x"
    subprocess.run(command.split(), check=True, capture_output=True)
    for certificate, key, message in (
        (pair.certificate, other.key, "do not belong together"),
        (pair.certificate, tmp_path / "none", "No such file"),
        (empty, pair.key, "gateway.tls_cert .*empty.pem"),
        (pair.certificate, empty, "gateway.tls_key .*empty.pem"),
        (pair.certificate, locked, "has a passphrase"),
    ):
        with pytest.raises(ConfigError, match=message):
            TlsFiles(certificate, key)


@pytest.mark.parametrize("fields", [{"tls_cert": "a"}, {"tls_key": "a"}])
def test_certificate_and_key_are_given_together(fields):
    with pytest.raises(ConfigError, match=r"tls_cert and gateway\.tls_key need each other"):
        TlsFiles.from_config(GatewayConfig(**fields))


@pytest.mark.parametrize("name", ["tls_cert", "tls_key"])
def test_an_empty_name_is_refused(name):
    with pytest.raises(ConfigError, match=f"{name} is empty"):
        GatewayConfig(**{name: " "})


def test_no_files_no_tls():
    assert TlsFiles.from_config(GatewayConfig()) is None
    config = GatewayConfig(tls_cert=str(Path("/nothing.crt")), tls_key="/nothing.key")
    with pytest.raises(ConfigError, match="No such file"):
        TlsFiles.from_config(config)
