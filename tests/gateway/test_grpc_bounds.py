"""gRPC requests that never come, or have millions of parts, which are counted before parsing."""

import asyncio

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jserve.gateway.grpc_bounds import count_parts
from jserve.proto import inference_pb2, types_pb2
from tests.gateway.grpc_serving import all_of, failure, generate, serving

REQUEST = inference_pb2.GenerateRequest.DESCRIPTOR


def field(name: str, body: bytes, descriptor=REQUEST) -> bytes:
    number, size = descriptor.fields_by_name[name].number, len(body)
    head = bytearray([number << 3 | 2])
    while size > 127:
        head.append(size & 127 | 128)
        size >>= 7
    return bytes([*head, size]) + body


CHAT = REQUEST.fields_by_name["chat"].message_type
SAMPLING = types_pb2.SamplingParams.DESCRIPTOR
HOSTILE = {
    "messages": field("chat", field("messages", b"", CHAT) * 1_000_000),
    "stops": field("stop", b"") * 1_000_000,
    "biases": field("sampling", field("logit_bias", b"", SAMPLING) * 1_000_000),
    "inputs": field("token_ids", b"") * 1_000_000,
    "numbers": field("token_ids", field("ids", b"\5" * 3_000_000, types_pb2.TokenIds.DESCRIPTOR)),
    "unknown": b"\x98\x7d\x01" * 1_000_000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_message_of_very_many_parts_is_refused(name):
    async def main():
        async with serving() as (stub, engine, _, channel):
            prefix = "/jserve.v1.Inference/"
            call = channel.unary_stream(prefix + "Generate")(HOSTILE[name])
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "parts" in caught.value.details()
            start = inference_pb2.GenerateStreamRequest.DESCRIPTOR
            stream = channel.stream_stream(
                prefix + "GenerateStream",
                response_deserializer=inference_pb2.GenerateResponse.FromString,
            )()
            await stream.write(field("start", HOSTILE[name], start))
            await stream.done_writing()
            answers = [message async for message in stream]
            assert [it.error.code for it in answers] == [3]
            assert not engine.submitted
            long = inference_pb2.TokenizeRequest(text="x" * (100 << 10))
            assert len((await stub.Tokenize(long)).token_ids) > 512  # it is only counted

    asyncio.run(main())


@given(
    stops=st.lists(st.text(st.characters(codec="utf-8"), max_size=4), max_size=4),
    biases=st.dictionaries(st.integers(0, 99), st.floats(width=32), max_size=4),
    contents=st.lists(st.text(st.characters(codec="utf-8"), max_size=200), max_size=4),
    n=st.integers(0, 9),
)
def test_parts_are_those_of_the_message(stops, biases, contents, n):
    chat = inference_pb2.Chat(
        messages=[inference_pb2.ChatMessage(role="u", content=content) for content in contents]
    )
    sampling = types_pb2.SamplingParams(logit_bias=biases, allowed_token_ids=[1, 2, 3])
    message = inference_pb2.GenerateRequest(chat=chat, sampling=sampling, stop=stops, n=n)
    expected = 1 + len(contents) * 2 + sum(map(bool, contents))  # chat, messages, role, content
    expected += 2 + len(biases) * 3 + len(stops) + bool(n)
    data = message.SerializeToString()
    assert count_parts(data, REQUEST, 1000) == expected
    assert count_parts(data, REQUEST, 2) == min(expected, 3)


@given(data=st.binary(max_size=200))
def test_any_bytes_can_be_counted(data):
    assert 0 <= count_parts(data, REQUEST, 50) <= 51


UNARY = {
    "/jserve.v1.Inference/Generate": "stream_stream",
    "/jserve.v1.Inference/Tokenize": "stream_unary",
    "/grpc.health.v1.Health/Check": "stream_unary",
    "/grpc.health.v1.Health/Watch": "stream_stream",
}


@pytest.mark.parametrize("method", UNARY)
def test_a_call_whose_request_does_not_come_ends(method):
    async def main():
        async with serving(body_timeout_s=0.2, step_s=0.02) as (stub, engine, _, channel):

            async def answer(*, closes: bool) -> grpc.aio.AioRpcError:
                """The end of a call that sends no message, or says that it will send none."""
                call = getattr(channel, UNARY[method])(method)()
                if closes:
                    await call.done_writing()
                read = call.read() if UNARY[method] == "stream_stream" else call
                return await failure(asyncio.wait_for(read, 5))

            silent, closed = await asyncio.gather(answer(closes=False), answer(closes=True))
            assert silent.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            assert silent.details() == "the request did not come within 0.2 s"
            assert closed.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "without a request" in closed.details()
            assert not engine.submitted
            # The bound is of the request alone, not of its answer.
            messages = await all_of(stub.Generate(generate(max_tokens=25)))
            assert messages[-1].usage.completion_tokens == 25
            assert messages[-1].timings.total_s > 0.4

    asyncio.run(main())


def test_a_stream_without_a_request_yet_stays_open():
    async def main():
        async with serving(body_timeout_s=0.1) as (stub, _, _, _):
            stream = stub.GenerateStream()
            await asyncio.sleep(0.3)
            request = generate(max_tokens=2, request_id="a")
            await stream.write(inference_pb2.GenerateStreamRequest(start=request))
            await stream.done_writing()
            assert (await all_of(stream))[-1].usage.completion_tokens == 2

    asyncio.run(main())
