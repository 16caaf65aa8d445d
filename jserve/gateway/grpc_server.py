"""The gRPC front end's socket: the public service, health, reflection, keys and limits."""

import asyncio
from typing import Any

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from jserve.core.addresses import host_and_port
from jserve.core.errors import ConfigError, Unauthenticated
from jserve.gateway.api_keys import ApiKeys
from jserve.gateway.config import GatewayConfig
from jserve.gateway.connection_limits import ConnectionLimits
from jserve.gateway.grpc_bounds import AwaitedMessages, BoundedMessages
from jserve.gateway.grpc_errors import abort
from jserve.gateway.grpc_messages import EncodedResponses
from jserve.gateway.grpc_service import InferenceService
from jserve.gateway.metrics import GatewayMetrics
from jserve.gateway.request_plane import RequestPlane
from jserve.gateway.tls import TlsFiles, grpc_credentials
from jserve.proto import inference_pb2, inference_pb2_grpc

_SERVICE = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
_HEALTH_SERVICE = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
_WATCH_POLL_S = 0.25
_MAX_METADATA_BYTES = 16 << 10
_PARTS_OF_A_MESSAGE = 4  # of a chat: itself, its role, its content


class HealthService(health_pb2_grpc.HealthServicer):
    """grpc.health.v1: SERVING exactly while a request would be answered."""

    def __init__(self, plane: RequestPlane) -> None:
        self._plane = plane

    async def Check(  # noqa: N802  the names in the .proto, here and below
        self, request: health_pb2.HealthCheckRequest, context: Any
    ) -> health_pb2.HealthCheckResponse:
        """The status now; NOT_FOUND for a service that is not here."""
        if request.service not in ("", _SERVICE):
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no service {request.service!r}")
        return health_pb2.HealthCheckResponse(status=self._status(request.service))

    async def List(self, request: Any, context: Any) -> Any:  # noqa: N802
        return health_pb2.HealthListResponse(  # pyright: ignore  newer than its stub
            statuses={
                name: health_pb2.HealthCheckResponse(status=self._status(name))
                for name in ("", _SERVICE)
            }
        )

    async def Watch(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: Any
    ) -> None:
        told = None
        while True:
            status = self._status(request.service)
            if status != told:
                await context.write(health_pb2.HealthCheckResponse(status=status))
                told = status
            await asyncio.sleep(_WATCH_POLL_S)

    def _status(self, service: str) -> health_pb2.HealthCheckResponse.ServingStatus:
        if service not in ("", _SERVICE):
            return health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        if self._plane.ready:
            return health_pb2.HealthCheckResponse.SERVING
        return health_pb2.HealthCheckResponse.NOT_SERVING


class ApiKeyInterceptor(grpc.aio.ServerInterceptor):
    """Lets in calls with metadata `authorization: Bearer <key>`; health checks are open."""

    def __init__(self, keys: ApiKeys) -> None:
        self._keys = keys

    async def intercept_service(
        self,
        continuation: Any,
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Puts a refusal in place of the method for a caller without a key."""
        handler = await continuation(handler_call_details)
        method: str = handler_call_details.method
        if handler is None or method.startswith(f"/{_HEALTH_SERVICE}/"):
            return handler
        grant = self._keys.find_in(handler_call_details.invocation_metadata)
        return _refusal(handler) if grant is None else handler


def _refusal(handler: Any) -> Any:
    """A handler of the same kind that aborts every call."""

    async def refuse(_: Any, context: Any) -> None:
        await abort(
            context,
            Unauthenticated("the API key is missing or wrong; send authorization: Bearer <key>"),
        )

    make = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }[handler.request_streaming, handler.response_streaming]
    return make(refuse, handler.request_deserializer, handler.response_serializer)


class GrpcServer:
    """The public gRPC endpoint. Owned by the event loop it is started on."""

    def __init__(self, plane: RequestPlane, metrics: GatewayMetrics) -> None:
        config = plane.config
        keys = ApiKeys.from_config(config) if config.has_keys else None
        interceptors: list[grpc.aio.ServerInterceptor] = []
        if keys is not None:
            interceptors.append(ApiKeyInterceptor(keys))
        # HTTP adds time for the bytes of a body; gRPC does not say how many have come.
        interceptors.append(AwaitedMessages(config.body_timeout_s))
        interceptors.append(EncodedResponses())
        interceptors.append(BoundedMessages(config.max_chat_messages * _PARTS_OF_A_MESSAGE + 2048))
        self._server = grpc.aio.server(interceptors=interceptors, options=_options(config))
        inference_pb2_grpc.add_InferenceServicer_to_server(
            InferenceService(plane, metrics, keys), self._server
        )
        health_pb2_grpc.add_HealthServicer_to_server(HealthService(plane), self._server)
        reflection.enable_server_reflection(
            (_SERVICE, _HEALTH_SERVICE, reflection.SERVICE_NAME), self._server
        )
        self._tls = TlsFiles.from_config(config)
        self._address = host_and_port(config.host, config.grpc_port)
        self.port = 0  # set by `start`

    async def start(self) -> None:
        """Listens; ConfigError if the port is taken."""
        try:
            if self._tls is None:
                self.port = self._server.add_insecure_port(self._address)
            else:
                credentials = grpc_credentials(self._tls)
                self.port = self._server.add_secure_port(self._address, credentials)
        except RuntimeError as error:
            raise ConfigError(
                f"gRPC cannot listen on {self._address}; choose another with --grpc_port"
            ) from error
        await self._server.start()

    async def stop(self, grace_s: float) -> None:
        """Refuses new calls, gives the present ones `grace_s`, then cancels them."""
        await self._server.stop(grace_s)


def _options(config: GatewayConfig) -> list[tuple[str, int]]:
    keepalive_ms = int(config.grpc_keepalive_s * 1000)
    limits = ConnectionLimits.from_config(config)
    return [
        ("grpc.max_receive_message_length", config.max_body_bytes),
        ("grpc.max_send_message_length", -1),  # bounded by the context: prompt logprobs are large
        ("grpc.max_metadata_size", _MAX_METADATA_BYTES),
        ("grpc.so_reuseport", 0),  # a taken port is an error, not shared with a stranger
        ("grpc.max_allowed_incoming_connections", limits.max_connections),
        # TLS, the preface and the first settings; a request's head comes in one frame after it.
        ("grpc.server_handshake_timeout_ms", int(limits.head_timeout_s * 1000)),
        # Pings find dead clients, and those that read nothing, whose generations are then aborted.
        ("grpc.keepalive_time_ms", keepalive_ms),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 1),
        # Clients may ping as often as every 10 s, with or without calls.
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
        ("grpc.http2.max_ping_strikes", 2),
        ("grpc.max_concurrent_streams", config.max_grpc_streams),
    ]
