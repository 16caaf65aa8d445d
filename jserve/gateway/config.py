"""Settings of the request plane. Plain data."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig:
    """Addresses, API keys, limits and default sampling of a gateway.

    `default_*` override the model's own generation config; None leaves it alone.
    """

    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 8500
    served_model_name: str = ""  # empty: the engine's name of the model
    api_keys: tuple[str, ...] = ()  # empty: everybody may ask
    cors_origins: tuple[str, ...] = ()  # empty: no CORS headers

    # Bounds of one request. The engine has its own bounds of context and queue.
    max_body_bytes: int = 8 << 20  # size of an HTTP body or a gRPC message
    max_json_depth: int = 32
    max_choices: int = 128  # `n`
    max_stop_strings: int = 16
    max_stop_string_chars: int = 256
    max_request_id_chars: int = 128
    max_chat_messages: int = 4096
    max_prompts: int = 256  # prompts in one HTTP completion request
    max_streams_per_call: int = 1024  # requests in flight on one GenerateStream call
    max_grpc_streams: int = 4096  # calls on one gRPC connection

    # Bounds of one tenant: all requests with one key, or from one address where there is none.
    max_tenant_sequences: int | None = None  # in flight; None: all but a 16th of the queue
    max_tenant_slots: int | None = None  # that run at a time; None: as many as there are
    any_priority: bool = False  # whether everybody may set `priority`; else it has no effect

    # Output that clients have not read, in bytes; over a bound the request ends with an error.
    max_request_buffer_bytes: int = 32 << 20  # of one request
    max_buffer_bytes: int = 256 << 20  # of all together

    default_temperature: float | None = None
    default_top_k: int | None = None
    default_top_p: float | None = None
    default_min_p: float | None = None
    default_repetition_penalty: float | None = None
    default_max_tokens: int | None = None  # None: as in the generation config

    sse_keep_alive_s: float = 15.0  # comment frames while nothing else is sent
    grpc_keepalive_s: float = 60.0  # pings to idle clients
    reconnect_s: float = 0.25  # pause between attempts to reach the engine
    drain_s: float = 30.0  # time for requests to finish after SIGTERM
