"""Every error that a user of jserve can see, as one tree.

JserveError
├── RequestError              the client's fault (HTTP 400, INVALID_ARGUMENT)
│   ├── PromptTooLong         prompt + max_tokens exceed the context
│   ├── UnknownModel          (HTTP 404, NOT_FOUND)
│   └── Unauthenticated       (HTTP 401, UNAUTHENTICATED)
├── Overloaded                a queue or bound is full (HTTP 429, RESOURCE_EXHAUSTED), retry later
├── Unavailable               no engine can answer now (HTTP 503, UNAVAILABLE), retry later
├── EngineError               the server's fault (HTTP 500, INTERNAL)
└── ConfigError               a config or a model file is wrong; raised before serving

Messages name the field, the value and the remedy. `STATUS` is the one mapping to wire codes.
"""

from dataclasses import dataclass


class JserveError(Exception):
    """An error that a user of jserve can see."""


class RequestError(JserveError):
    """The request is wrong. `param` names the offending field, `code` is machine-readable."""

    code: str | None = None

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class PromptTooLong(RequestError):
    """The prompt, or prompt + max_tokens, can never fit."""

    code = "context_length_exceeded"


class UnknownModel(RequestError):
    """The request names a model that is not served here."""

    code = "model_not_found"


class Unauthenticated(RequestError):
    """The API key is missing or wrong."""

    code = "invalid_api_key"


class _RetryLater(JserveError):
    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Overloaded(_RetryLater):
    """The queue, or what one client may have, is full; try again after `retry_after_s` seconds."""


class Unavailable(_RetryLater):
    """No engine can answer: it is starting, draining, or has just died."""


class EngineError(JserveError):
    """The engine failed while it worked on the request."""


class ConfigError(JserveError):
    """A config value or a model file is wrong; nothing is served."""


@dataclass(frozen=True, slots=True)
class Status:
    """Wire form of an error: HTTP status, gRPC status name, OpenAI error type."""

    http: int
    grpc: str
    openai_type: str


STATUS: dict[type[JserveError], Status] = {
    UnknownModel: Status(404, "NOT_FOUND", "invalid_request_error"),
    Unauthenticated: Status(401, "UNAUTHENTICATED", "authentication_error"),
    RequestError: Status(400, "INVALID_ARGUMENT", "invalid_request_error"),
    Overloaded: Status(429, "RESOURCE_EXHAUSTED", "rate_limit_error"),
    Unavailable: Status(503, "UNAVAILABLE", "service_unavailable_error"),
    JserveError: Status(500, "INTERNAL", "server_error"),
}


def wire_status(error: JserveError) -> Status:
    """The wire status of the nearest listed ancestor of `error`."""
    return next(STATUS[cls] for cls in type(error).__mro__ if cls in STATUS)
