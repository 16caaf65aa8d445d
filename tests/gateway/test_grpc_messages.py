"""Long log-probabilities in gRPC messages: built in pieces, and the same message as in one."""

import asyncio

import pytest

from jserve.core.logprobs import PackedLogprobs
from jserve.core.request import FinishReason, TokenLogprobs
from jserve.gateway.grpc_messages import encode, make_response
from jserve.gateway.output import OutputDelta
from jserve.gateway.pauses import Pauses
from jserve.proto import inference_pb2
from jserve.proto.convert import logprobs_to_proto
from tests.gateway.http.http_serving import byte_tokenizer

TOKENS = byte_tokenizer()


def positions(num: int, num_top: int) -> list[TokenLogprobs]:
    top = tuple((66 + i, -0.5 - i) for i in range(num_top))
    return [TokenLogprobs(65 + i % 100, -i / 8, 2, top) for i in range(num)]


def in_one_piece(delta: OutputDelta) -> inference_pb2.GenerateResponse:
    def describe(message, token_id):
        message.token, message.raw = TOKENS.token_text(token_id), TOKENS.token_bytes(token_id)

    message = make_response(delta, "a")
    for position in delta.logprobs or ():
        logprobs_to_proto(position, message.logprobs.add(), describe)
    for position in delta.prompt_logprobs or ():
        logprobs_to_proto(position, message.prompt_logprobs.add(), describe)
    return message


@pytest.mark.parametrize("num_prompt", [0, 1, 15, 16, 17, 4000])
@pytest.mark.parametrize("num_output", [0, 3, 16, 40])
def test_pieces_parse_as_the_whole_message(num_prompt, num_output):
    delta = OutputDelta(
        1,
        "text",
        (65,) * num_output,
        logprobs=PackedLogprobs(positions(num_output, 2)),
        prompt_logprobs=PackedLogprobs([None, *positions(num_prompt, 20)]),
        finish=FinishReason.STOP,
        stop_reason="x",
    )

    async def main():
        turns, done = 0, False

        async def others():
            nonlocal turns
            while not done:
                turns += 1
                await asyncio.sleep(0)

        running = asyncio.create_task(others())
        data = await encode(make_response(delta, "a"), delta, TOKENS, Pauses())
        done = True
        await running
        return data, turns

    data, turns = asyncio.run(main())
    assert inference_pb2.GenerateResponse.FromString(data) == in_one_piece(delta)
    if num_prompt == 4000:  # 100 ms and more, in pieces of two
        assert turns > 10
