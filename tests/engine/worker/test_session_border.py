"""A bad request over a session is a rejection; the other sequences of the engine go on."""

import asyncio

import grpc.aio

from jserve.core.request import Request, SamplingParams
from jserve.engine.worker.session_server import serve_sessions
from jserve.proto import engine_pb2, engine_pb2_grpc
from jserve.proto.convert import request_to_proto
from tests.gateway.fixtures import INFO, LoopThread, unix_address

BAD = {
    "stops": SamplingParams(stop_token_ids=tuple(range(3, 43))),
    "biases": SamplingParams(logit_bias=tuple((token, 1.0) for token in range(400))),
    "stranger": SamplingParams(bad_token_ids=(10**9,)),
    "nan": SamplingParams(temperature=float("nan")),
    "penalty": SamplingParams(repetition_penalty=0.0),
    "logprobs": SamplingParams(logprobs=1000),
}


def test_bad_requests_are_rejected_one_by_one() -> None:
    async def main() -> None:
        with LoopThread().running() as loop:
            server = await serve_sessions(unix_address(), INFO, loop.inbox, loop.outbox)
            async with grpc.aio.insecure_channel(server.address) as channel:
                call = engine_pb2_grpc.EngineStub(channel).Session()
                await call.read()
                asked = {**BAD, "good": SamplingParams(max_tokens=3)}
                for name, sampling in asked.items():
                    request = Request(id=name, prompt=(7, 8), sampling=sampling)
                    submit = engine_pb2.SessionRequest(submit=request_to_proto(request))
                    await call.write(submit)
                await call.write(engine_pb2.SessionRequest())  # of no kind
                await call.write(engine_pb2.SessionRequest(submit=engine_pb2.EngineRequest()))
                rejected: dict[str, int] = {}
                tokens: list[int] = []
                finished = False
                while not finished or len(rejected) < len(BAD) + 1:
                    message = await asyncio.wait_for(call.read(), 5)
                    rejected |= {item.request_id: item.kind for item in message.rejections}
                    for update in message.updates:
                        tokens += update.tokens
                        finished = finished or bool(update.finish)
                assert set(rejected) == {*BAD, ""}
                assert set(rejected.values()) == {engine_pb2.Rejection.KIND_INVALID}
                assert tokens == [7, 8, 7]
                assert loop.num_added == 1
                call.cancel()
            await server.stop()

    asyncio.run(main())
