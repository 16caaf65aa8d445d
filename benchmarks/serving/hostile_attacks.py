"""Attacks of hostile clients, each in a process of its own; `benchmarks.serving.hostile` runs them.

An attack is a function of the server that prepares what it sends, and returns what is repeated
until its time is over.
"""

import asyncio
import contextlib
import json
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence

import grpc.aio

from benchmarks.serving.hostile_server import Act, Server
from jserve.gateway.job_child import step_aside
from jserve.proto import inference_pb2, types_pb2

# As that of the gateway's helper processes: it gets a tenth of a busy processor. With 19 it would
# get a hundredth, and hardly send anything.
_NICENESS = 10
_MIB = 1 << 20
_MOST_BYTES = 8 * _MIB  # of a body, or of a gRPC message
_NO_LIMIT = ("grpc.max_receive_message_length", -1)
_COMPLETIONS = "/v1/completions"
_CHATS = "/v1/chat/completions"

Attack = Callable[[Server], Act]


def _at_once(acts: Iterable[Act]) -> Act:
    together = list(acts)
    return lambda: asyncio.gather(*(act() for act in together))


def _empty_lists(server: Server) -> bytes:
    head, tail = f'{{"model":"{server.model}","prompt":['.encode(), b"[]]}"
    return head + b"[]," * ((_MOST_BYTES - len(head) - len(tail)) // 3) + tail


def _empty_prompts(server: Server) -> Act:
    return server.posting(_COMPLETIONS, _empty_lists(server))


def _bodies_in_line(server: Server) -> Act:
    return _at_once([server.posting(_COMPLETIONS, _empty_lists(server))] * 8)


def _deep_json(server: Server) -> Act:
    """Nested objects in a field that is not known."""
    body = b'{"x":' + b'{"a":[1],"b":{}},'.join([b"["] + [b""] * 400_000) + b"0]}"
    return server.posting(_COMPLETIONS, body[:_MOST_BYTES])


def _many_texts(server: Server) -> Act:
    prompts = [f"{i:x} lorem ipsum dolor 1234 " * 160 for i in range(256)]
    body = {"model": server.model, "prompt": [text[:4096] for text in prompts], "max_tokens": 1}
    return server.posting(_COMPLETIONS, body)


def _hex(length: int, seed: int) -> str:
    return "".join(f"{(seed * 7919 + j) & 0xFFFF:04x}" for j in range(length // 4))


def _long_texts(server: Server) -> Act:
    """Texts of 600 kB, which are too long for the model."""
    bodies = [{"model": server.model, "prompt": _hex(600_000, seed)} for seed in range(10)]
    return _at_once(server.posting(_COMPLETIONS, body) for body in bodies)


def _tokenize(server: Server) -> Act:
    """A megabyte to tokenize, and a million ids to make text of."""
    text = {"model": server.model, "prompt": "naïve 東京 data " * 60_000}
    ids = {"model": server.model, "tokens": list(range(2, 250)) * 4_000}
    return _at_once([server.posting("/tokenize", text), server.posting("/detokenize", ids)])


def _prompt_ids(server: Server, seed: int) -> list[int]:
    return [2 + (seed * 977 + i * 31) % (server.vocab - 2) for i in range(server.max_model_len - 8)]


def _prompt_logprobs(server: Server) -> Act:
    body = {"model": server.model, "max_tokens": 1, "prompt_logprobs": 20}
    bodies = [body | {"prompt": _prompt_ids(server, seed)} for seed in range(4)]
    return _at_once(server.posting(_COMPLETIONS, each) for each in bodies)


def _short_prompt_logprobs(server: Server) -> Act:
    """Prompts short enough to be answered within an attack."""
    body = {"model": server.model, "max_tokens": 1, "prompt_logprobs": 20}
    bodies = [body | {"prompt": _prompt_ids(server, seed)[:1500]} for seed in range(2)]
    return _at_once(server.posting(_COMPLETIONS, each) for each in bodies)


def _grpc_prompt_logprobs(server: Server) -> Act:
    sampling = types_pb2.SamplingParams(max_tokens=1, prompt_logprobs=20)
    ids = (types_pb2.TokenIds(ids=_prompt_ids(server, seed)) for seed in range(4))
    return _at_once(
        server.generating(inference_pb2.GenerateRequest(token_ids=each, sampling=sampling))
        for each in ids
    )


def _grpc_messages(server: Server) -> Act:
    """Messages of 8 MB: a text, ids, and a chat of very many messages."""
    message = inference_pb2.ChatMessage()
    requests = [
        inference_pb2.GenerateRequest(text=_hex(_MOST_BYTES - 4096, 1)),
        inference_pb2.GenerateRequest(token_ids=types_pb2.TokenIds(ids=[5] * (_MOST_BYTES - 64))),
        inference_pb2.GenerateRequest(chat=inference_pb2.Chat(messages=[message] * 4_000_000)),
    ]
    return _at_once(map(server.generating, requests))


def _masks(server: Server) -> Act:
    """Nearly the whole vocabulary allowed, for each of 128 choices."""
    body = {"model": server.model, "prompt": "x", "n": 128, "max_tokens": 4}
    return server.posting(_COMPLETIONS, body | {"allowed_token_ids": list(range(2, server.vocab))})


def _unread(server: Server) -> Act:
    """Choices with 20 alternatives a token, of which nothing is read."""
    body = {"model": server.model, "prompt": "x", "n": 128, "logprobs": 20, "max_tokens": 600}
    content = json.dumps(body | {"stream": True, "ignore_eos": True}).encode()
    head = f"POST {_COMPLETIONS} HTTP/1.1\r\nHost: {server.url.netloc}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"

    async def act() -> None:
        server.sent += 1
        with contextlib.suppress(OSError):
            _, writer = await server.connect(server.tls)
            writer.transport.pause_reading()  # pyright: ignore[reportAttributeAccessIssue]
            writer.write(head.encode() + content)
            await asyncio.sleep(3)
            writer.close()

    return act


def _grpc_unread(server: Server) -> Act:
    sampling = types_pb2.SamplingParams(max_tokens=600, logprobs=20, ignore_eos=True)
    request = inference_pb2.GenerateRequest(text="x", n=128, sampling=sampling)
    data = request.SerializeToString()

    async def act() -> None:
        server.sent += 1
        call = server.call(data)
        with contextlib.suppress(grpc.aio.AioRpcError):
            await call.read()
            await asyncio.sleep(3)
        call.cancel()

    return act


_BEGUN = (b"", b"GET /health HT", b"POST /v1/completions HTTP/1.1\r\nContent-Length: 9\r\n\r\n{")


async def _silent_connection(server: Server, first: bytes, tls: ssl.SSLContext | None) -> None:
    server.sent += 1
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(5):
            reader, writer = await server.connect(tls)
            writer.write(first)
            await reader.read()
            writer.close()


def _silent(server: Server) -> Act:
    """Connections that end their TLS handshake, if there is one, and then say half of nothing."""
    firsts = [_BEGUN[i % len(_BEGUN)] for i in range(500)]
    return lambda: asyncio.gather(*(_silent_connection(server, it, server.tls) for it in firsts))


def _silent_before_tls(server: Server) -> Act:
    """Connections that send nothing of a TLS handshake, or its first five bytes."""
    firsts = [(b"", b"\x16\x03\x01\x02\x00")[i % 2] for i in range(500)]
    return lambda: asyncio.gather(*(_silent_connection(server, it, None) for it in firsts))


def _many_requests(server: Server) -> Act:
    body = {"model": server.model, "max_tokens": 100, "ignore_eos": True}
    bodies = [body | {"prompt": f"{i} is a number that"} for i in range(200)]
    return _at_once(server.posting(_COMPLETIONS, each) for each in bodies)


def _chats(server: Server) -> Act:
    turns = [{"role": ("user", "assistant")[i % 2], "content": f"turn {i}"} for i in range(3_999)]
    body = {"model": server.model, "messages": turns, "max_tokens": 1}
    return _at_once([server.posting(_CHATS, body)] * 6)


def _endless_templates(server: Server) -> Act:
    """Chats that the template never ends, if it is the one that `hostile` tells."""
    messages = [{"role": "user", "content": "endless"}]
    body = {"model": server.model, "messages": messages, "max_tokens": 1}
    return _at_once([server.posting(_CHATS, body)] * 6)


def _busy(count: int) -> Attack:
    """No attack: processes that compute beside the server, and never talk to it."""

    async def act() -> None:
        loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
        try:
            await asyncio.Event().wait()
        finally:
            for process in loops:
                process.kill()
                process.wait()

    return lambda server: act


CONTROLS: dict[str, Attack] = {
    "no attack: 1 busy process": _busy(1),
    "no attack: 2 busy processes": _busy(2),
}
ATTACKS: dict[str, Attack] = {
    **CONTROLS,
    "empty lists, 8 MB": _empty_prompts,
    "empty lists, 8 bodies of 8 MB in line": _bodies_in_line,
    "nested JSON, 8 MB": _deep_json,
    "256 prompts of 4,096 characters": _many_texts,
    "10 texts of 600 kB": _long_texts,
    "tokenize, detokenize 1 MB": _tokenize,
    "prompt_logprobs, 2 prompts of 1,500 ids": _short_prompt_logprobs,
    "prompt_logprobs, 4 longest prompts": _prompt_logprobs,
    "the same 4 over gRPC": _grpc_prompt_logprobs,
    "3 gRPC messages of 8 MB": _grpc_messages,
    "whole vocabulary allowed, n = 128": _masks,
    "n = 128, logprobs, unread": _unread,
    "the same unread over gRPC": _grpc_unread,
    "500 silent connections": _silent,
    "200 requests of one tenant": _many_requests,
    "6 chats of 4,000 turns": _chats,
    "6 endless templates": _endless_templates,
}
TLS_ATTACKS: dict[str, Attack] = {
    "500 connections, silent before TLS": _silent_before_tls,
}


async def run(name: str, url: str, grpc_address: str, facts: Sequence[str]) -> None:
    """Prepares one attack, says so, and repeats it for the seconds that it then reads.

    `facts` are those of `Server`: model, vocabulary, context length.
    """
    model, vocab, max_model_len = facts[0], int(facts[1]), int(facts[2])
    options = (_NO_LIMIT, ("grpc.enable_http_proxy", 0))
    async with grpc.aio.insecure_channel(grpc_address, options) as channel:
        server = Server(url, channel, model, vocab, max_model_len)
        act = (ATTACKS | TLS_ATTACKS)[name](server)
        print("ready", flush=True)
        seconds = float(sys.stdin.readline())
        cpu_s = time.process_time()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while True:
                    await act()
        cpu_s = time.process_time() - cpu_s
        print(json.dumps({"sent": server.sent, "answers": server.answers, "cpu_s": cpu_s}))


if __name__ == "__main__":
    step_aside(_NICENESS)
    asyncio.run(run(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:]))
