"""The listening socket of an engine: a Unix socket in a private folder, or TCP with a token."""

import asyncio
import fcntl
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import grpc.aio

from jserve.core.addresses import UNIX, check_engine_address, socket_path
from jserve.core.errors import ConfigError
from jserve.core.private_path import why_folder_not_private
from jserve.core.request import EngineInfo
from jserve.engine.inbox import Inbox, Outbox
from jserve.engine.worker.session import Constrain, EngineSessions
from jserve.proto import engine_pb2_grpc
from jserve.proto.limits import HEARTBEAT_S, MAX_SESSION_MESSAGE_BYTES

_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_SESSION_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_SESSION_MESSAGE_BYTES),
    ("grpc.so_reuseport", 0),  # a second engine on the port is an error, not a lottery
)
_MAX_PATH_BYTES = 107  # of a Unix socket, on Linux


class SessionServer:
    """The listening socket of an engine. Owned by the event loop it was started on."""

    def __init__(
        self,
        server: grpc.aio.Server,
        outbox: Outbox,
        address: str,
        claim: BinaryIO | None,
        beating: asyncio.Task[None],
        sessions: EngineSessions,
    ) -> None:
        self._server = server
        self._sessions = sessions
        self._beating = beating
        self._outbox = outbox
        self._claim = claim
        self.address = address  # where it listens: the port, or the name of the socket, is chosen

    @property
    def port(self) -> int:
        """The TCP port; 0 for a Unix socket."""
        return 0 if socket_path(self.address) else int(self.address.rpartition(":")[2])

    async def stop(self, grace_s: float = 0.0) -> None:
        """Takes no more gateways, waits `grace_s` for the present ones to go, drops the rest."""
        await self._server.stop(grace_s)
        self._beating.cancel()
        self._sessions.close()
        self._outbox.detach()
        path = socket_path(self.address)
        if path is not None:
            path.unlink(missing_ok=True)
        if self._claim is not None:
            self._claim.close()  # the file stays: whoever opened it before would lock it in vain


async def serve_sessions(
    address: str,
    info: EngineInfo,
    inbox: Inbox,
    outbox: Outbox,
    token: str | None = None,
    *,
    is_compiling: Callable[[], bool] = lambda: False,
    constrain: Constrain | None = None,
) -> SessionServer:
    """Listens until stopped. The loop may post at any time.

    `address` is one of:

    - `unix:/folder/name`: a socket in a folder that only this user can enter.
    - `unix:/folder/`: one of a new name in such a folder, which is for this engine alone.
    - `host:port` on loopback, port 0 for any: only for gateways that hold `token`.

    Raises:
        ConfigError: others can enter the folder, the address is not on loopback or is taken, or
            there is no token.
    """
    check_engine_address(address, has_token=token is not None)
    path = socket_path(address)
    claim = None
    if path is not None:
        path, claim = _claimed(path, is_folder=address.endswith("/"))
        address, token = f"{UNIX}{path}", None
    sessions = EngineSessions(
        info, inbox, outbox, token, is_compiling=is_compiling, constrain=constrain
    )
    server = grpc.aio.server(options=_OPTIONS)
    engine_pb2_grpc.add_EngineServicer_to_server(sessions, server)
    try:
        bound = server.add_insecure_port(address)
    except RuntimeError as error:
        raise ConfigError(f"engine address {address!r}: cannot be opened, or is taken") from error
    loop = asyncio.get_running_loop()
    outbox.attach(_Coalescer(loop, sessions.deliver).wake)
    await server.start()
    if path is None:
        address = f"{address.rpartition(':')[0]}:{bound}"
    beating = asyncio.create_task(_beat(sessions))
    return SessionServer(server, outbox, address, claim, beating, sessions)


async def _beat(sessions: EngineSessions) -> None:
    while True:
        await asyncio.sleep(HEARTBEAT_S)
        sessions.beat()


def _claimed(path: Path, *, is_folder: bool) -> tuple[Path, BinaryIO | None]:
    """The path to listen on, and the lock that keeps other engines from it where they know it."""
    folder = path if is_folder else path.parent
    if reason := why_folder_not_private(folder):
        raise ConfigError(
            f"engine address {UNIX}{path}: {folder}: {reason}; use a folder of your own, mode 0700"
        )
    if is_folder:
        for old in folder.glob("engine-*.sock"):  # of an engine that was killed
            old.unlink(missing_ok=True)
        path = folder / f"engine-{secrets.token_hex(4)}.sock"
    if len(bytes(path)) > _MAX_PATH_BYTES:
        raise ConfigError(f"engine address {UNIX}{path}: at most {_MAX_PATH_BYTES} bytes")
    if is_folder:
        return path, None
    # Binding takes the path over, also from a live engine: so a lock beside it tells.
    claim = Path(f"{path}.lock").open("ab")  # noqa: SIM115  held until the server stops
    try:
        fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        claim.close()
        raise ConfigError(f"engine address {UNIX}{path} is taken by another engine") from None
    return path, claim


class _Coalescer:
    """Calls back on the event loop, once for all wake-ups since the last call."""

    def __init__(self, loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
        self._loop = loop
        self._callback = callback
        self._scheduled = False

    def wake(self) -> None:
        """From any thread; calls are serialized by the outbox's lock."""
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon_threadsafe(self._run)

    def _run(self) -> None:
        self._scheduled = False  # before taking, so that later events schedule another call
        self._callback()
