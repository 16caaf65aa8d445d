"""`jserve.v1.Inference`: the public gRPC API over a generator."""

import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from jserve.core.errors import JserveError
from jserve.gateway.generation import Generator
from jserve.gateway.grpc_errors import abort
from jserve.gateway.grpc_messages import generation_of, prompt_of, responses
from jserve.gateway.grpc_stream import GenerateStream
from jserve.gateway.metrics import GatewayMetrics
from jserve.gateway.validation import token_ids
from jserve.proto import inference_pb2, inference_pb2_grpc


class InferenceService(inference_pb2_grpc.InferenceServicer):
    """Stateless but for generator and metrics; inference.proto has the contract of each call."""

    def __init__(self, generator: Generator, metrics: GatewayMetrics) -> None:
        self._generator = generator
        self._metrics = metrics

    async def Generate(  # noqa: N802  the names in the .proto, here and below
        self, request: inference_pb2.GenerateRequest, context: Any
    ) -> None:
        """One prompt. A deadline, a cancelled call or a lost client aborts the generation."""
        started_s = self._generator.clock.now_s()
        try:
            request_id = request.request_id or new_request_id()
            generation = await generation_of(self._generator, request, request_id)
            running = self._generator.run(generation, self._metrics)
            async with aclosing(running) as pieces:
                async for response in responses(self._generator, generation, pieces, started_s):
                    await context.write(response)  # waits while the client's window is full
        except JserveError as error:
            await abort(context, error)

    async def GenerateStream(  # noqa: N802
        self,
        request_iterator: AsyncIterator[inference_pb2.GenerateStreamRequest],
        context: Any,
    ) -> None:
        """Many generations; ends when the client has closed its half and all have ended."""
        stream = GenerateStream(self._generator, self._metrics, context.write)
        try:
            await stream.serve(request_iterator)
        except JserveError as error:
            await abort(context, error)

    async def Tokenize(  # noqa: N802
        self, request: inference_pb2.TokenizeRequest, context: Any
    ) -> inference_pb2.TokenizeResponse:
        """Text or a chat to token ids."""
        try:
            self._generator.check_model(request.model)
            prompt = await prompt_of(self._generator, request)
            return inference_pb2.TokenizeResponse(
                token_ids=prompt.ids, max_model_len=self._generator.info.max_model_len
            )
        except JserveError as error:
            await abort(context, error)

    async def Detokenize(  # noqa: N802
        self, request: inference_pb2.DetokenizeRequest, context: Any
    ) -> inference_pb2.DetokenizeResponse:
        """Token ids to text, special tokens included."""
        try:
            self._generator.check_model(request.model)
            ids = token_ids("token_ids", list(request.token_ids), self._generator.info.vocab)
            text = self._generator.tokenizer.decode(ids, skip_special_tokens=False)
            return inference_pb2.DetokenizeResponse(text=text)
        except JserveError as error:
            await abort(context, error)

    async def ListModels(  # noqa: N802
        self, request: inference_pb2.ListModelsRequest, context: Any
    ) -> inference_pb2.ListModelsResponse:
        """The one model that is served."""
        try:
            model = inference_pb2.Model(
                id=self._generator.model_name, max_model_len=self._generator.info.max_model_len
            )
            return inference_pb2.ListModelsResponse(models=[model])
        except JserveError as error:
            await abort(context, error)


def new_request_id() -> str:
    """An id for a request that brought none."""
    return f"gen-{uuid.uuid4().hex}"
