"""`GenerateStream` over real sockets: many generations on one call, each with an end of its own."""

import asyncio

import grpc
import grpc.aio

from jserve.proto import inference_pb2, types_pb2
from tests.gateway.fixtures import eventually
from tests.gateway.grpc_serving import PROMPT, all_of, serving, start


def test_one_stream_carries_many_generations():
    async def main():
        async with serving() as (stub, _, _, _):
            call = stub.GenerateStream()
            for i in range(6):
                await call.write(start(f"r{i}", max_tokens=i + 1))
            await call.write(start("bad", max_tokens=-1))
            await call.write(start("r7", model="other"))
            await call.done_writing()
            messages = await all_of(call)
            for i in range(6):
                mine = [m for m in messages if m.request_id == f"r{i}"]
                assert mine[-1].usage.completion_tokens == i + 1
                assert PROMPT.startswith("".join(m.text for m in mine).rstrip("\ufffd"))
            failures = {m.request_id: m.error for m in messages if m.HasField("error")}
            assert failures.keys() == {"bad", "r7"}
            assert failures["bad"].code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
            assert "max_tokens" in failures["bad"].message
            assert failures["r7"].code == grpc.StatusCode.NOT_FOUND.value[0]
            assert await call.code() is grpc.StatusCode.OK

    asyncio.run(main())


def test_cancel_on_a_stream_ends_one_generation_only():
    async def main():
        async with serving(step_s=0.002, max_streams_per_call=3) as (stub, engine, plane, _):
            call = stub.GenerateStream()
            await call.write(start("kept", max_tokens=60))
            await call.write(start("cancelled"))
            await call.write(start("kept"))  # in use
            await eventually(lambda: engine.stats.num_running == 2)
            await call.write(start("third", max_tokens=1))
            await call.write(inference_pb2.GenerateStreamRequest(cancel="unknown"))
            await call.write(inference_pb2.GenerateStreamRequest(cancel="cancelled"))
            await call.done_writing()
            messages = await all_of(call)
            last = {m.request_id: m for m in messages if m.HasField("usage")}
            assert last["cancelled"].finish_reason == types_pb2.FINISH_REASON_ABORT
            assert last["cancelled"].usage.completion_tokens < 60
            assert last["kept"].usage.completion_tokens == 60
            assert last["third"].finish_reason == types_pb2.FINISH_REASON_LENGTH
            clash = [m for m in messages if m.error.code]
            assert [(m.request_id, m.error.code) for m in clash] == [("kept", 6)]
            assert len(engine.aborted) == 1
            assert plane.num_live == 0

    asyncio.run(main())


def test_empty_message_on_a_stream_fails_and_the_rest_goes_on():
    async def main():
        async with serving(step_s=0.005) as (stub, engine, _, _):
            call = stub.GenerateStream()
            await call.write(start("runs", max_tokens=30))
            first = await call.read()
            assert first.request_id == "runs"
            await call.write(inference_pb2.GenerateStreamRequest())
            await call.write(start("next", max_tokens=2))
            await call.done_writing()
            messages = [first]
            while (message := await call.read()) is not grpc.aio.EOF:
                messages.append(message)
            failed = [m for m in messages if m.HasField("error")]
            assert [m.request_id for m in failed] == [""]
            assert failed[0].error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
            assert "neither start nor cancel" in failed[0].error.message
            ends = {m.request_id: m.finish_reason for m in messages if m.finish_reason}
            length = types_pb2.FINISH_REASON_LENGTH
            assert ends == {"runs": length, "next": length}
            assert await call.code() == grpc.StatusCode.OK
            assert engine.aborted == []

    asyncio.run(main())


def test_stream_bounds_its_generations_and_dies_with_its_client():
    async def main():
        async with serving(step_s=0.005, max_streams_per_call=2) as (stub, engine, _, _):
            call = stub.GenerateStream()
            for i in range(3):
                await call.write(start(f"r{i}"))
            async for message in call:
                if message.HasField("error"):
                    break
            assert message.request_id == "r2"
            assert message.error.code == grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]
            assert message.error.retry_after_s == 1.0
            call.cancel()
            await eventually(lambda: len(engine.aborted) == 2)

    asyncio.run(main())
