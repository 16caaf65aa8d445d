"""The server as a hostile client knows it: requests prepared as bytes, answers counted."""

import asyncio
import contextlib
import json
import ssl
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

import grpc.aio

from jserve.proto import inference_pb2

_READ_BYTES = 1 << 20

Act = Callable[[], Awaitable[object]]


class Server:
    """The server as an attacker knows it, and what it has answered.

    What is sent is ready before the attack begins, and answers are only counted: the attacker's own
    work is small, because it shares the processors of the server. Owned by one attack.
    """

    def __init__(
        self, url: str, channel: grpc.aio.Channel, model: str, vocab: int, max_model_len: int
    ) -> None:
        self.url = urlsplit(url)
        self.tls = unverified() if self.url.scheme == "https" else None
        self.model = model
        self.vocab = vocab
        self.max_model_len = max_model_len
        self.sent = 0
        self.answers: Counter[str] = Counter()  # by status
        self._channel = channel

    def posting(self, path: str, body: bytes | Mapping[str, Any]) -> Act:
        """Prepares a request, which each call sends, reading whatever the answer is."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: {self.url.netloc}\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        data = head.encode() + content
        return lambda: self.send(data)

    async def connect(
        self, tls: ssl.SSLContext | None
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        host, port = self.url.hostname, self.url.port
        return await asyncio.open_connection(host, port, ssl=tls, limit=_READ_BYTES)

    async def send(self, data: bytes) -> None:
        """Sends a request on a connection of its own and reads to the end of the answer."""
        self.sent += 1
        with contextlib.suppress(OSError):
            reader, writer = await self.connect(self.tls)
            try:
                writer.write(data)
                self.answers[(await reader.read(_READ_BYTES))[9:12].decode()] += 1
                while await reader.read(_READ_BYTES):
                    pass
            finally:
                writer.close()

    def generating(self, request: inference_pb2.GenerateRequest) -> Act:
        """Prepares a call of `Generate`, whose answer is read and not parsed."""
        data = request.SerializeToString()

        async def act() -> None:
            self.sent += 1
            try:
                async for _ in self.call(data):
                    pass
                self.answers["OK"] += 1
            except grpc.aio.AioRpcError as error:
                self.answers[error.code().name] += 1

        return act

    def call(self, data: bytes) -> Any:
        """Begins a call of `Generate`; messages are bytes."""
        return self._channel.unary_stream("/jserve.v1.Inference/Generate")(data)


def unverified() -> ssl.SSLContext:
    """TLS without a check of the certificate, which is the benchmark's own."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context
