"""Who may talk to an engine, and whom a gateway takes for one: sockets, folders, tokens."""

import asyncio
import hashlib
import hmac
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import grpc.aio
import pytest

from jserve.core.errors import ConfigError
from jserve.core.request import Request
from jserve.engine.inbox import Inbox, Outbox
from jserve.engine.worker import session
from jserve.engine.worker.session_server import SessionServer, serve_sessions
from jserve.gateway.grpc_engine_client import GrpcEngineClient
from jserve.proto import engine_pb2, engine_pb2_grpc
from jserve.proto.convert import info_to_proto
from tests.gateway.fixtures import INFO, LoopThread, closing, eventually, unix_address

TOKEN = "0123456789abcdef" * 4
OTHER = "f" * 64
TCP = "127.0.0.1:0"


@asynccontextmanager
async def serving(address: str, token: str | None = None) -> AsyncIterator[SessionServer]:
    with LoopThread().running() as loop:
        server = await serve_sessions(address, INFO, loop.inbox, loop.outbox, token)
        try:
            yield server
        finally:
            await server.stop()


async def answers(client: GrpcEngineClient) -> bool:
    """Whether `client` finds its engine; then a request is answered."""
    client.start()
    try:
        await asyncio.wait_for(client.wait_ready(), 0.5)
    except TimeoutError:
        return False
    stream = client.submit([Request(id="a", prompt=(7, 8))])
    return len([update async for update in stream]) > 0


def run(main: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(main(), 30))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("engine_token", "gateway_token", "found"),
    [(TOKEN, TOKEN, True), (TOKEN, OTHER, False)],
)
def test_over_tcp_both_hold_the_token(engine_token: str, gateway_token: str, found: bool) -> None:
    async def main() -> None:
        async with serving(TCP, engine_token) as server:
            client = GrpcEngineClient(server.address, reconnect_s=0.02, token=gateway_token)
            async with closing(client):
                assert await answers(client) is found

    run(main)


def test_a_stranger_gets_nothing_from_an_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "_PROOF_TIMEOUT_S", 0.1)

    async def refused(
        server: SessionServer,
        *messages: engine_pb2.SessionRequest,
        metadata: tuple[tuple[str, str], ...] = (),
    ) -> None:
        async with grpc.aio.insecure_channel(server.address) as channel:
            call = engine_pb2_grpc.EngineStub(channel).Session(metadata=metadata)
            for message in messages:
                await call.write(message)
            assert await call.code() is grpc.StatusCode.UNAUTHENTICATED

    async def main() -> None:
        async with serving(TCP, TOKEN) as server:
            nonce = (("jserve-nonce", "1" * 64),)
            await refused(server)
            await refused(server, metadata=nonce)  # says nothing more
            await refused(server, engine_pb2.SessionRequest(proof=b"x" * 32), metadata=nonce)
            await refused(server, engine_pb2.SessionRequest(abort="a"), metadata=nonce)
            await refused(server, metadata=(("jserve-nonce", "1" * 4096),))

    run(main)


class Impostor(engine_pb2_grpc.EngineServicer):
    """A process of another user on the port of an engine that has died."""

    def __init__(self) -> None:
        self.heard: list[engine_pb2.SessionRequest] = []
        self.metadata: list[object] = []

    async def Session(  # noqa: N802  the name in the .proto
        self, request_iterator: AsyncIterator[engine_pb2.SessionRequest], context: object
    ) -> None:
        self.metadata += context.invocation_metadata()  # type: ignore[attr-defined]
        metadata = (("jserve-nonce", "2" * 64), ("jserve-proof-bin", b"x" * 32))
        await context.send_initial_metadata(metadata)  # type: ignore[attr-defined]
        await context.write(engine_pb2.SessionResponse(hello=info_to_proto(INFO)))  # type: ignore[attr-defined]
        async for message in request_iterator:
            self.heard.append(message)


def test_an_impostor_on_the_port_learns_neither_token_nor_prompt() -> None:
    async def main() -> None:
        impostor, server = Impostor(), grpc.aio.server()
        engine_pb2_grpc.add_EngineServicer_to_server(impostor, server)
        port = server.add_insecure_port(TCP)
        await server.start()
        client = GrpcEngineClient(f"127.0.0.1:{port}", reconnect_s=0.02, token=TOKEN)
        async with closing(client):
            assert await answers(client) is False
            assert impostor.metadata
            assert TOKEN not in repr(impostor.metadata)
            # What it was told proves nothing to the engine: it is no proof of the gateway.
            async with serving(TCP, TOKEN) as engine:
                client.connect_to(engine.address)
                await asyncio.wait_for(client.wait_ready(), 5)
        assert impostor.heard == []
        await server.stop(0)

    run(main)


def test_the_proof_is_an_hmac_over_both_nonces() -> None:
    from jserve.proto.session_auth import Side, is_proof, proof

    for side, word in ((Side.ENGINE, b"engine"), (Side.GATEWAY, b"gateway")):
        message = b"jserve " + word + b"\0one\0two"
        expected = hmac.new(TOKEN.encode(), message, hashlib.sha256).digest()
        assert proof(TOKEN, side, "one", "two") == expected
        assert is_proof(expected, TOKEN, side, "one", "two")
        assert not is_proof(expected, TOKEN, side, "two", "one")
        assert not is_proof(None, TOKEN, side, "one", "two")


def test_a_gateway_follows_the_address_and_drops_what_stands_elsewhere() -> None:
    async def main() -> None:
        async with serving(unix_address()) as old, serving(unix_address()) as new:
            client = GrpcEngineClient(old.address, reconnect_s=0.02)
            async with closing(client):
                assert await answers(client)
                client.connect_to(new.address)  # the old one still lives, and may be anybody's
                await eventually(lambda: not client.ready)
                await asyncio.wait_for(client.wait_ready(), 5)
                client.connect_to(None)
                await eventually(lambda: not client.ready)
                await asyncio.sleep(0.1)
                assert not client.ready

    run(main)


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701])
def test_a_folder_that_others_can_enter_is_refused_by_both(tmp_path: Path, mode: int) -> None:
    address = unix_address()
    folder = Path(address.removeprefix("unix:")).parent
    folder.chmod(mode)

    async def main() -> None:
        with pytest.raises(ConfigError, match="mode 0700"):
            await serve_sessions(address, INFO, Inbox(), Outbox())
        folder.chmod(0o700)
        async with serving(address):
            folder.chmod(mode)
            client = GrpcEngineClient(address, reconnect_s=0.02)
            async with closing(client):
                assert await answers(client) is False

    run(main)


def test_addresses_that_cannot_be_served() -> None:
    async def main() -> None:
        for address, token, words in (
            ("127.0.0.1:0", None, "need a token"),
            ("localhost:0", None, "need a token"),
            ("0.0.0.0:0", TOKEN, "loopback"),
            ("example.com:80", TOKEN, "loopback"),
            ("127.0.0.1:99999", TOKEN, "host:port"),
            ("nowhere", TOKEN, "host:port"),
            ("unix:/no/such/folder/name", None, "No such file"),
            (f"{unix_address()}{'x' * 100}", None, "at most 107 bytes"),
        ):
            with pytest.raises(ConfigError, match=words):
                await serve_sessions(address, INFO, Inbox(), Outbox(), token)
        with pytest.raises(ConfigError, match="need a token"):
            GrpcEngineClient("127.0.0.1:1", reconnect_s=1)
        for address in (TCP, unix_address()):
            async with serving(address, TOKEN) as server:
                with pytest.raises(ConfigError, match="taken"):
                    await serve_sessions(server.address, INFO, Inbox(), Outbox(), TOKEN)

    run(main)


def test_a_folder_gets_a_new_socket_each_time_and_loses_the_old() -> None:
    folder = Path(unix_address().removeprefix("unix:")).parent

    async def main() -> None:
        (folder / "engine-0.sock").touch()
        async with serving(f"unix:{folder}/") as first:
            names = os.listdir(folder)
            assert names == [Path(first.address.removeprefix("unix:")).name]
            assert first.port == 0
        async with serving(f"unix:{folder}/") as second:
            assert second.address != first.address
        assert os.listdir(folder) == []

    run(main)
