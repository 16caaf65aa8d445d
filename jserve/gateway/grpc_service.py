"""`jserve.v1.Inference`: the public gRPC API over a request plane."""

import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from jserve.core.errors import JserveError
from jserve.gateway.api_keys import ApiKeys
from jserve.gateway.grpc_errors import abort
from jserve.gateway.grpc_messages import parse_generation, parse_prompt, responses
from jserve.gateway.grpc_stream import GenerateStream
from jserve.gateway.metrics import GatewayMetrics
from jserve.gateway.request_plane import RequestPlane
from jserve.gateway.tenants import Caller, at_address, host_of_peer
from jserve.proto import inference_pb2, inference_pb2_grpc

_LONGEST_DEADLINE_S = 1e6  # gRPC's word for none is a very long time


class InferenceService(inference_pb2_grpc.InferenceServicer):
    """Handlers of the public API; inference.proto has the contract of each call."""

    def __init__(self, plane: RequestPlane, metrics: GatewayMetrics, keys: ApiKeys | None) -> None:
        """`keys` name the tenants of calls; without any, an address does."""
        self._plane = plane
        self._metrics = metrics
        self._keys = keys

    async def Generate(  # noqa: N802  the names in the .proto, here and below
        self, request: inference_pb2.GenerateRequest, context: Any
    ) -> None:
        """Completes one prompt. A deadline, a cancelled call or a lost client aborts it."""
        started_s = self._plane.clock.now_s()
        try:
            request_id = request.request_id or new_request_id()
            parsed = await parse_generation(self._plane, request, request_id, self._caller(context))
            deadline_s = _time_left_s(context)
            running = self._plane.run(parsed.generation, self._metrics, deadline_s=deadline_s)
            async with aclosing(running) as deltas:
                async for response in responses(self._plane, parsed, deltas, started_s):
                    await context.write(response)  # waits while the client's window is full
        except JserveError as error:
            await abort(context, error)

    async def GenerateStream(  # noqa: N802
        self,
        request_iterator: AsyncIterator[inference_pb2.GenerateStreamRequest],
        context: Any,
    ) -> None:
        """Runs many generations; ends when the client has closed its half and all have ended."""
        stream = GenerateStream(
            self._plane,
            self._metrics,
            context.write,
            self._caller(context),
            lambda: _time_left_s(context),
        )
        try:
            await stream.serve(request_iterator)
        except JserveError as error:
            await abort(context, error)

    async def Tokenize(  # noqa: N802
        self, request: inference_pb2.TokenizeRequest, context: Any
    ) -> inference_pb2.TokenizeResponse:
        try:
            self._plane.check_model(request.model)
            caller = self._caller(context)
            with self._plane.preparing(caller, 1, None):
                prompt = await parse_prompt(self._plane, request, caller)
            return inference_pb2.TokenizeResponse(
                token_ids=prompt.ids, max_model_len=self._plane.info.max_model_len
            )
        except JserveError as error:
            await abort(context, error)

    async def Detokenize(  # noqa: N802
        self, request: inference_pb2.DetokenizeRequest, context: Any
    ) -> inference_pb2.DetokenizeResponse:
        """Detokenizes, special tokens included."""
        try:
            self._plane.check_model(request.model)
            with self._plane.preparing(self._caller(context), 1, None):
                text = await self._plane.prompts.detokenize("token_ids", request.token_ids)
            return inference_pb2.DetokenizeResponse(text=text)
        except JserveError as error:
            await abort(context, error)

    async def ListModels(  # noqa: N802
        self, request: inference_pb2.ListModelsRequest, context: Any
    ) -> inference_pb2.ListModelsResponse:
        try:
            most = self._plane.info.max_model_len
            models = [
                inference_pb2.Model(id=name, max_model_len=most) for name in self._plane.model_names
            ]
            return inference_pb2.ListModelsResponse(models=models)
        except JserveError as error:
            await abort(context, error)

    def _caller(self, context: Any) -> Caller:
        """The tenant of a call that was let in: of its key, else of its address."""
        may = self._plane.config.any_priority
        if self._keys is not None:
            grant = self._keys.find_in(context.invocation_metadata() or ())
            if grant is not None:
                return grant.caller(any_priority=may)
        return at_address(host_of_peer(context.peer()), may_set_priority=may)


def new_request_id() -> str:
    return f"gen-{uuid.uuid4().hex}"


def _time_left_s(context: Any) -> float | None:
    """Seconds until the client's deadline; None if it has set none."""
    left_s: float | None = context.time_remaining()
    return None if left_s is None or left_s > _LONGEST_DEADLINE_S else max(left_s, 0.0)
