"""Settings of the request plane. Plain data."""

import enum
from dataclasses import dataclass
from typing import Any

from jserve.core.errors import ConfigError
from jserve.core.field_types import check_types
from jserve.core.secret import Secret

MAX_SLOTS = 2**31 - 1  # the most of a bound of slots or sequences; as on the wire


class UnknownFields(enum.Enum):
    """The treatment of request fields that no API of this server has."""

    REFUSE = "refuse"
    IGNORE = "ignore"


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig:
    """Addresses, API keys, limits and default sampling of a gateway.

    `default_*` override the model's own generation config; None leaves it alone.
    """

    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int = 8500
    served_model_name: str = ""  # empty: the engine's name of the model
    served_model_aliases: tuple[str, ...] = ()  # more names that requests may use
    api_keys: tuple[str | Secret, ...] = ()  # without a file, too: everybody may ask
    api_keys_file: str | None = None  # TOML: [keys.NAME] with the key or its SHA-256, and rights
    open: bool = False  # other machines may ask without a key
    # Names in `Host` besides local ones; `*.example.com` is all below, `*` is any. Empty: on a
    # loopback address local names only, elsewhere any.
    allowed_hosts: tuple[str, ...] = ()
    tls_cert: str | None = None  # PEM files for HTTP and gRPC; read anew when they change
    tls_key: str | None = None
    cors_origins: tuple[str, ...] = ()  # beside pages of this machine, which may always call
    # Unknown fields of a request: an error, or named in the header X-Jserve-Ignored-Fields.
    unknown_fields: UnknownFields = UnknownFields.REFUSE

    # Bounds of connections. HTTP keeps a few more for probes; gRPC has its own count.
    max_connections: int = 16_384
    head_timeout_s: float = 10.0  # first byte and head of a request
    # Its body, and a second more for each 16 KiB of it; over gRPC its whole message.
    body_timeout_s: float = 30.0
    write_timeout_s: float = 60.0  # a client that takes nothing of its answer

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
    # Of all together. Over it, the largest request of the tenant who holds the most ends.
    max_buffer_bytes: int = 256 << 20

    # Responses (`/v1/responses`) that are kept to be continued or fetched, with `store` and for all
    # tenants; then the oldest one of the tenant who holds the most goes. 0: none is kept.
    max_stored_responses: int = 4096
    max_stored_response_bytes: int = 64 << 20

    # How the model writes calls of tools, and reasoning: names of parsers, or none. None: as its
    # chat template tells.
    tool_parser: str | None = None
    reasoning_parser: str | None = None

    default_temperature: float | None = None
    default_top_k: int | None = None
    default_top_p: float | None = None
    default_min_p: float | None = None
    default_repetition_penalty: float | None = None
    default_max_tokens: int | None = None  # None: as in the generation config

    sse_keep_alive_s: float = 15.0  # comment frames while nothing else is sent
    grpc_keepalive_s: float = 60.0  # pings to idle clients
    reconnect_s: float = 0.25  # pause between attempts to reach the engine
    # Longest time that a request waits for the next engine after one has died.
    resume_wait_s: float = 60.0
    drain_s: float = 30.0  # time for requests to finish after SIGTERM

    def __post_init__(self) -> None:
        object.__setattr__(self, "api_keys", _secrets(self.api_keys))
        check_types(self, "gateway.")  # or the comparisons would fail without the name
        for name in ("max_connections", "head_timeout_s", "body_timeout_s", "write_timeout_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"gateway.{name} is {getattr(self, name)}; more than 0 is needed")
        for name in ("max_tenant_sequences", "max_tenant_slots"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= MAX_SLOTS:
                raise ConfigError(f"gateway.{name} is {value}; it must be 1 or more, or None")
        for name in ("max_request_buffer_bytes", "max_buffer_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"gateway.{name} is {getattr(self, name)}; it must be 1 or more")
        for name in ("max_stored_responses", "max_stored_response_bytes"):
            if getattr(self, name) < 0:
                raise ConfigError(f"gateway.{name} is {getattr(self, name)}; it must be 0 or more")
        for name in ("api_keys_file", "tls_cert", "tls_key"):
            value = getattr(self, name)
            if value is not None and not value.strip():
                raise ConfigError(
                    f"gateway.{name} is empty; is a variable unset? Leave it out to have no file"
                )

    @property
    def keys(self) -> tuple[Secret, ...]:
        """`api_keys`, each of which is a Secret once the config is made."""
        return tuple(key for key in self.api_keys if isinstance(key, Secret))

    @property
    def has_keys(self) -> bool:
        """Whether callers need a key."""
        return bool(self.api_keys) or self.api_keys_file is not None


def check_key(name: str, key: str) -> None:
    """Raises ConfigError for a key that every caller has, or that no header can carry."""
    if not key.strip():
        raise ConfigError(
            f"{name}: a key is empty; is a variable unset? Leave the keys out to have none"
        )
    if key != key.strip() or not key.isprintable():
        raise ConfigError(
            f"{name}: a key begins or ends with a space or has control characters, which no header "
            "keeps"
        )


def _secrets(keys: Any) -> tuple[Secret, ...]:
    if not isinstance(keys, tuple) or not all(isinstance(key, str | Secret) for key in keys):
        raise ConfigError(
            "gateway.api_keys is <secret>, but must be a tuple of texts, for example ('key',)"
        )
    secrets = tuple(key if isinstance(key, Secret) else Secret(key) for key in keys)
    for secret in secrets:
        check_key("gateway.api_keys", secret.reveal())
    return secrets
