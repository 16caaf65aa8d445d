"""TLS of both front ends, with certificates that are renewed while the server runs."""

import asyncio
import contextlib
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
from jserve.gateway.connection_limits import RESERVE, ConnectionLimits
from jserve.gateway.fake_engine import FakeEngine
from jserve.gateway.grpc_server import GrpcServer
from jserve.gateway.http.server import HttpServer
from jserve.gateway.metrics import ConnectionCounts, GatewayMetrics
from jserve.gateway.tls import TlsFiles
from jserve.proto import inference_pb2, inference_pb2_grpc
from tests.gateway.certificates import Pair, make_pair
from tests.gateway.fixtures import INFO, closing, eventually, make_plane


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


LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


@contextlib.asynccontextmanager
async def https(pair: Pair, counts: ConnectionCounts, **limits):
    """A server with limits; yields a function that asks a path of it in a new connection."""
    app = PlainTextResponse("alive")
    server = HttpServer(
        app,
        host="127.0.0.1",
        port=0,
        drain_s=1.0,
        tls=TlsFiles(pair.certificate, pair.key),
        limits=ConnectionLimits.from_config(GatewayConfig(**limits)),
        counts=counts,
    )
    await server.start()
    verify = ssl.create_default_context(cafile=str(pair.certificate))

    async def ask(path: str) -> int:
        async with httpx.AsyncClient(verify=verify, timeout=5) as http:
            return (await http.get(f"https://localhost:{server.port}{path}")).status_code

    yield server.port, ask
    await server.stop()


async def ended(reader: asyncio.StreamReader) -> bool:
    """Whether the server closes the connection within five seconds."""
    with contextlib.suppress(ConnectionResetError):
        await asyncio.wait_for(reader.read(), 5)
    return True


def run(loop: str, main) -> None:
    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(main())


@pytest.mark.parametrize("loop", LOOPS)
def test_connections_without_a_handshake_are_counted_and_leave_room_for_probes(tmp_path, loop):
    pair, counts = make_pair(tmp_path, "first"), ConnectionCounts()

    async def main():
        async with https(pair, counts, max_connections=4) as (port, ask):
            silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(4)]
            await eventually(lambda: counts.open == 4)
            assert [await ask(path) for path in ("/health", "/ready", "/x")] == [200, 200, 503]
            # More than the reserve holds: the oldest make room for the newest, and for a probe.
            extra = [await asyncio.open_connection("127.0.0.1", port) for _ in range(60)]
            assert await ended(extra[0][0])
            await eventually(lambda: counts.refused >= 60 - RESERVE)
            assert counts.open == 4 + RESERVE
            assert [await ask(path) for path in ("/health", "/ready")] == [200, 200]
            for _, writer in silent + extra:
                writer.close()
            await eventually(lambda: counts.open == 0)
            assert await ask("/x") == 200
            stays = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
            await eventually(lambda: counts.open == 3)
        assert all([await ended(reader) for reader, _ in stays])  # the server has stopped
        for _, writer in stays:
            writer.close()
        assert counts.open == 0

    run(loop, main)


# The first bytes of a hello, a whole record of nonsense, and another protocol.
@pytest.mark.parametrize("sent", [b"", b"\x16\x03\x01\x02\x00", b"GET / HTTP/1.1\r\n\r\n"])
@pytest.mark.parametrize("loop", LOOPS)
def test_a_handshake_that_does_not_come_is_given_up(tmp_path, loop, sent):
    pair, counts = make_pair(tmp_path, "first"), ConnectionCounts()

    async def main():
        async with https(pair, counts, head_timeout_s=0.3) as (port, ask):
            begin_s = asyncio.get_running_loop().time()
            pairs = [await asyncio.open_connection("127.0.0.1", port) for _ in range(20)]
            for _, writer in pairs:
                writer.write(sent)
            await asyncio.gather(*(ended(reader) for reader, _ in pairs))
            is_tls = not sent.startswith(b"GET")
            assert (asyncio.get_running_loop().time() - begin_s >= 0.3) == is_tls
            await eventually(lambda: counts.open == 0)
            assert counts.timed_out == 20 * is_tls
            for _, writer in pairs:
                writer.close()
            assert await ask("/health") == 200

    run(loop, main)


def test_grpc_counts_connections_without_a_handshake(tmp_path):
    pair = make_pair(tmp_path, "first")

    async def main():
        engine = FakeEngine(INFO)
        plane = make_plane(
            engine,
            tls_cert=str(pair.certificate),
            tls_key=str(pair.key),
            max_connections=4,
            head_timeout_s=0.5,
        )
        server = GrpcServer(plane, GatewayMetrics(clock=plane.clock))
        await server.start()
        async with closing(engine):
            pairs = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(8)]
            closing_tasks = [asyncio.create_task(ended(reader)) for reader, _ in pairs]
            await asyncio.sleep(0.25)
            assert sum(task.done() for task in closing_tasks) == 4  # above the limit
            await asyncio.gather(*closing_tasks)
            for _, writer in pairs:
                writer.close()
        await server.stop(0)

    asyncio.run(main())


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
