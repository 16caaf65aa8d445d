"""The gRPC server around the calls: health, reflection, API keys, limits, drain."""

import asyncio

import grpc
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from jserve.core.errors import ConfigError
from jserve.gateway.fake_engine import FakeEngine
from jserve.gateway.grpc_server import GrpcServer
from jserve.gateway.metrics import GatewayMetrics
from jserve.proto import inference_pb2, inference_pb2_grpc
from tests.gateway.fixtures import INFO, closing, make_plane
from tests.gateway.grpc_serving import all_of, failure, generate, serving, start


def test_health_follows_the_engine():
    async def main():
        async with serving() as (_, engine, plane, channel):
            health = health_pb2_grpc.HealthStub(channel)
            serving_, not_serving = 1, 2
            check = health_pb2.HealthCheckRequest
            assert (await health.Check(check())).status == serving_
            assert (await health.Check(check(service="jserve.v1.Inference"))).status == serving_
            watch = health.Watch(check())
            assert (await watch.read()).status == serving_
            engine.crash()
            assert (await health.Check(check())).status == not_serving
            assert (await asyncio.wait_for(watch.read(), 5)).status == not_serving
            engine.restart()
            assert (await asyncio.wait_for(watch.read(), 5)).status == serving_
            await plane.drain(0)
            assert (await health.Check(check())).status == not_serving
            listed = await health.List(health_pb2.HealthListRequest())
            assert listed.statuses["jserve.v1.Inference"].status == not_serving
            error = await failure(health.Check(check(service="other")))
            assert error.code() is grpc.StatusCode.NOT_FOUND

    asyncio.run(main())


def test_reflection_describes_the_service():
    async def main():
        async with serving() as (_, _, _, channel):
            stub = reflection_pb2_grpc.ServerReflectionStub(channel)
            call = stub.ServerReflectionInfo()
            await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
            listed = (await call.read()).list_services_response.service
            assert "jserve.v1.Inference" in {service.name for service in listed}
            assert "grpc.health.v1.Health" in {service.name for service in listed}
            symbol = "jserve.v1.Inference"
            await call.write(reflection_pb2.ServerReflectionRequest(file_containing_symbol=symbol))
            files = (await call.read()).file_descriptor_response.file_descriptor_proto
            names = {descriptor_pb2.FileDescriptorProto.FromString(f).name for f in files}
            assert "jserve/proto/inference.proto" in names
            call.cancel()

    asyncio.run(main())


def test_api_key_guards_everything_but_health():
    async def main():
        async with serving(api_keys=("secret", "other")) as (stub, engine, _, channel):
            bad = [(), (("authorization", "Bearer wrong"),), (("authorization", "secret"),)]
            for metadata in bad:
                call = stub.Generate(generate(max_tokens=1), metadata=metadata)
                error = await failure(all_of(call))
                assert error.code() is grpc.StatusCode.UNAUTHENTICATED
            error = await failure(stub.ListModels(inference_pb2.ListModelsRequest()))
            assert error.code() is grpc.StatusCode.UNAUTHENTICATED
            error = await failure(all_of(stub.GenerateStream(iter([start("a")]))))
            assert error.code() is grpc.StatusCode.UNAUTHENTICATED
            assert engine.submitted == []
            good = (("authorization", "Bearer other"),)
            assert await all_of(stub.Generate(generate(max_tokens=1), metadata=good))
            health = health_pb2_grpc.HealthStub(channel)
            assert (await health.Check(health_pb2.HealthCheckRequest())).status == 1

    asyncio.run(main())


def test_keys_of_a_file_guard_calls(tmp_path):
    path = tmp_path / "keys.toml"
    path.write_text("[keys.team]\nkey = 'one'\n")
    path.chmod(0o600)

    async def main():
        async with serving(api_keys_file=str(path)) as (stub, _, _, _):
            models = inference_pb2.ListModelsRequest()
            error = await failure(stub.ListModels(models))
            assert error.code() is grpc.StatusCode.UNAUTHENTICATED
            assert await stub.ListModels(models, metadata=(("authorization", "Bearer one"),))

    asyncio.run(main())


def test_message_over_the_limit_is_refused():
    async def main():
        async with serving(max_body_bytes=10_000) as (stub, _, _, _):
            error = await failure(all_of(stub.Generate(generate("x" * 20_000))))
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert await all_of(stub.Generate(generate(max_tokens=2)))

    asyncio.run(main())


def test_drain_finishes_what_runs_and_refuses_the_rest():
    async def main():
        async with serving(step_s=0.005) as (stub, _, plane, _):
            running = stub.Generate(generate(max_tokens=20))
            await anext(aiter(running))
            draining = asyncio.create_task(plane.drain(5))
            await asyncio.sleep(0)
            error = await failure(all_of(stub.Generate(generate())))
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            assert "shutting down" in error.details()
            assert (await all_of(running))[-1].usage.completion_tokens == 20
            assert await draining

            plane.draining = False
            endless = stub.Generate(generate())
            await anext(aiter(endless))
            assert not await plane.drain(0.02)
            error = await failure(all_of(endless))
            assert error.code() is grpc.StatusCode.UNAVAILABLE

    asyncio.run(main())


def test_taken_port_is_a_config_error():
    async def main():
        plane = make_plane(FakeEngine(INFO))
        first = GrpcServer(plane, GatewayMetrics(clock=plane.clock))
        await first.start()
        plane = make_plane(FakeEngine(INFO), grpc_port=first.port)
        with pytest.raises(ConfigError, match="--grpc_port"):
            await GrpcServer(plane, GatewayMetrics(clock=plane.clock)).start()
        await first.stop(0)

    asyncio.run(main())


def test_silent_connections_are_closed_and_counted():
    """Neither a connection without HTTP/2 nor one too many stays; a channel works beside them."""

    async def closed(reader: asyncio.StreamReader) -> bool:
        try:
            await asyncio.wait_for(reader.read(), 5)
        except (TimeoutError, ConnectionResetError) as error:
            return isinstance(error, ConnectionResetError)
        return True

    async def main():
        engine = FakeEngine(INFO)
        plane = make_plane(engine, head_timeout_s=0.3, max_connections=4)
        server = GrpcServer(plane, GatewayMetrics(clock=plane.clock))
        await server.start()
        async with (
            closing(engine),
            grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel,
        ):
            await channel.channel_ready()
            pairs = [await asyncio.open_connection("127.0.0.1", server.port) for _ in range(6)]
            for _, writer in pairs[::2]:
                writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
            assert await asyncio.gather(*(closed(reader) for reader, _ in pairs)) == [True] * 6
            for _, writer in pairs:
                writer.close()
            stub = inference_pb2_grpc.InferenceStub(channel)
            assert await all_of(stub.Generate(generate(max_tokens=2)))
        await server.stop(0)

    asyncio.run(main())
