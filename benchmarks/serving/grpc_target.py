"""jserve's gRPC service as a target: one `Generate` call per request, all on one channel."""

import time

import grpc
import grpc.aio

from benchmarks.serving.failures import BenchmarkError, NotReady, RequestFailed
from benchmarks.serving.record import Record
from benchmarks.serving.target import ServerInfo
from benchmarks.serving.workload import Job
from jserve.proto import inference_pb2, inference_pb2_grpc, types_pb2

_CONNECT_TIMEOUT_S = 5.0


class GrpcTarget:
    """A `Target` whose every message tells its token ids, so tokens per chunk are exact."""

    def __init__(
        self,
        address: str,
        *,
        model: str | None = None,
        prompt: str = "auto",
        token_ids: tuple[int, int] = (100, 500),
        api_key: str | None = None,
    ) -> None:
        self._address = address
        self._model = model
        self._prompt = "ids" if prompt == "auto" else prompt
        self._token_ids = token_ids
        self._metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()
        self._channel = grpc.aio.insecure_channel(address, (("grpc.enable_http_proxy", 0),))
        self._stub = inference_pb2_grpc.InferenceStub(self._channel)

    async def check(self) -> ServerInfo:
        try:
            listed = await self._stub.ListModels(
                inference_pb2.ListModelsRequest(),
                metadata=self._metadata,
                timeout=_CONNECT_TIMEOUT_S,
            )
        except grpc.aio.AioRpcError as error:
            raise self._explained(error) from None
        models = {model.id: model for model in listed.models}
        if self._model is not None and self._model not in models:
            raise BenchmarkError(
                f"grpc://{self._address} does not serve {self._model!r}; "
                f"set --model to one of {', '.join(models)}"
            )
        model = models[self._model or next(iter(models))]
        return ServerInfo(model.id, "grpc", self._prompt, model.max_model_len)

    def prepare(self, job: Job) -> inference_pb2.GenerateRequest:
        sampling = types_pb2.SamplingParams(
            max_tokens=job.output_tokens, temperature=0, ignore_eos=True, repetition_penalty=1
        )
        request = inference_pb2.GenerateRequest(model=self._model or "", sampling=sampling)
        if self._prompt == "ids":
            request.token_ids.ids.extend(job.token_ids(*self._token_ids))
        else:
            request.text = job.text()
        return request

    async def send(self, request: inference_pb2.GenerateRequest, record: Record) -> None:
        record.sent_s = time.perf_counter()
        try:
            async for message in self._stub.Generate(request, metadata=self._metadata):
                now_s = time.perf_counter()
                record.arrive(now_s, message.text, len(message.token_ids))
                if message.HasField("usage"):
                    record.prompt_tokens = message.usage.prompt_tokens
                    record.output_tokens = message.usage.completion_tokens
                    record.cached_tokens = message.usage.cached_tokens
                    record.finish(now_s)
        except grpc.aio.AioRpcError as error:
            raise RequestFailed(f"{error.code().name}: {error.details()}") from None
        if record.output_tokens is None:
            raise RequestFailed("the stream ended before the answer was complete")

    async def close(self) -> None:
        await self._channel.close()

    def _explained(self, error: grpc.aio.AioRpcError) -> BenchmarkError:
        details = " ".join((error.details() or "").split())
        what = f"grpc://{self._address}: {error.code().name}: {details}"
        match error.code():
            case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.DEADLINE_EXCEEDED:
                return NotReady(f"{what}; start the server, wait until it is ready, or mend --url")
            case grpc.StatusCode.UNAUTHENTICATED:
                return BenchmarkError(f"{what}; give the right --api_key")
            case _:
                return BenchmarkError(f"{what}; --url must be the gRPC address of jserve")
