"""A tiny HTTP server on loopback whose answers are scripted to the byte."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

SSE_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
END = None  # in a script: closes the connection


@dataclass
class Request:
    method: str
    path: str
    headers: dict[str, str]
    body: Any


Script = Sequence[bytes | None]  # pieces; each goes out on its own


@dataclass
class ScriptedServer:
    """Answers each request by `answer(request)`."""

    answer: Callable[[Request], Script]
    requests: list[Request] = field(default_factory=list)
    num_connections: int = 0
    url: str = ""

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                first, *lines = head.split("\r\n")
                headers = dict(line.lower().split(": ", 1) for line in lines if line)
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                method, path, _ = first.split(" ")
                request = Request(method, path, headers, json.loads(body) if body else None)
                self.requests.append(request)
                if not await self._play(self.answer(request), writer):
                    break
        writer.close()

    async def _play(self, script: Script, writer: asyncio.StreamWriter) -> bool:
        for piece in script:
            if piece is END:
                return False
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.001)  # the client reads it before the next one comes
        return True


@contextlib.asynccontextmanager
async def serving(answer: Callable[[Request], Script]) -> AsyncIterator[ScriptedServer]:
    """Serves while the context is open."""
    scripted = ScriptedServer(answer)
    server = await asyncio.start_server(scripted.handle, "127.0.0.1", 0)
    scripted.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield scripted
    finally:
        server.close()
        await asyncio.sleep(0.005)  # connections that the client dropped are noticed


def plain(body: bytes, status: int = 200, content_type: str = "application/json") -> list[bytes]:
    head = f"HTTP/1.1 {status} X\r\ncontent-type: {content_type}\r\ncontent-length: {len(body)}"
    return [head.encode() + b"\r\n\r\n" + body]


def chunked(payload: bytes, cut: int | None = None) -> list[bytes]:
    """An event stream in HTTP chunks, the whole message cut into pieces of `cut` bytes."""
    sizes = [payload[i : i + 37] for i in range(0, len(payload), 37)]
    body = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in sizes) + b"0\r\n\r\n"
    message = SSE_HEAD + b"transfer-encoding: chunked\r\n\r\n" + body
    cut = cut or len(message)
    return [message[i : i + cut] for i in range(0, len(message), cut)]


def sse(*events: dict[str, Any] | str) -> bytes:
    texts = (event if isinstance(event, str) else json.dumps(event) for event in events)
    return "".join(f"data: {text}\n\n" for text in texts).encode()


def completion(text: str, finish: str | None = None, **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": text, "finish_reason": finish}], **more}


def usage(prompt: int, output: int) -> dict[str, Any]:
    return {"choices": [], "usage": {"prompt_tokens": prompt, "completion_tokens": output}}


def models(*ids: str, **fields: Any) -> list[bytes]:
    cards = [{"id": name, "object": "model", **fields} for name in ids]
    return plain(json.dumps({"object": "list", "data": cards}).encode())
