"""The public gRPC API on loopback, over a scripted engine, and messages to send to it."""

from contextlib import asynccontextmanager

import grpc
import grpc.aio
import pytest

from jserve.gateway.fake_engine import FakeEngine, echo, nothing_cached
from jserve.gateway.grpc_server import GrpcServer
from jserve.gateway.metrics import GatewayMetrics
from jserve.proto import inference_pb2, inference_pb2_grpc, types_pb2
from tests.gateway.fixtures import INFO, closing, make_plane

PROMPT = "Hello, 你好 👍! "


@asynccontextmanager
async def serving(*, step_s=0.0, reply=echo, cached=nothing_cached, channel_options=(), **config):
    """A running server: yields (stub, engine, plane, channel)."""
    engine = FakeEngine(INFO, step_s=step_s, reply=reply, cached=cached)
    plane = make_plane(engine, **config)
    async with serving_plane(plane, engine, channel_options) as served:
        yield served


@asynccontextmanager
async def serving_plane(plane, engine, channel_options=()):
    """A running server of `plane`: yields (stub, engine, plane, channel)."""
    server = GrpcServer(plane, GatewayMetrics(clock=plane.clock))
    await server.start()
    async with (
        closing(engine),
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}", channel_options) as channel,
    ):
        yield inference_pb2_grpc.InferenceStub(channel), engine, plane, channel
    await server.stop(0)


def generate(text=PROMPT, *, max_tokens=None, stop=(), **fields):
    sampling = fields.pop("sampling", types_pb2.SamplingParams())
    if max_tokens is not None:
        sampling.max_tokens = max_tokens
    return inference_pb2.GenerateRequest(text=text, sampling=sampling, stop=stop, **fields)


async def failure(awaitable) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await awaitable
    return caught.value


async def all_of(call):
    return [message async for message in call]


def start(request_id, **fields):
    return inference_pb2.GenerateStreamRequest(start=generate(request_id=request_id, **fields))
