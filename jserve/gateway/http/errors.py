"""Errors in the form of the API that a path belongs to, with their HTTP status and headers."""

import math
from collections.abc import Callable
from typing import TypeAlias

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

from jserve.core.errors import JserveError, PromptTooLong, RequestError, wire_status

_REASONS = {
    404: ("unknown_url", "no such URL: {method} {path}; see /v1/models for a first one"),
    405: ("method_not_allowed", "{path} does not take {method}"),
}

ErrorForm: TypeAlias = Callable[[JserveError, str], dict[str, object]]  # of an error and request id

MESSAGES_PATH = "/v1/messages"  # and below it: the Anthropic API
OLLAMA_PATH = "/api"  # below it: the Ollama API

# Anthropic's error types by HTTP status; others are faults of the request, or of the server.
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class HttpError(RequestError):
    """A fault of the HTTP message itself, with the HTTP status that names it."""

    def __init__(self, status: int, message: str, *, code: str, param: str | None = None) -> None:
        super().__init__(message, param=param)
        self.status = status
        self.code = code


def openai_error(error: JserveError, request_id: str) -> dict[str, object]:
    """OpenAI's `{"error": {…}}` object, for a body or an event of a stream."""
    fields = {
        "message": str(error),
        "type": wire_status(error).openai_type,
        "param": error.param if isinstance(error, RequestError) else None,
        "code": error.code if isinstance(error, RequestError) else None,
    }
    return {"error": fields}


def anthropic_error(error: JserveError, request_id: str) -> dict[str, object]:
    """Anthropic's error object, for a body or an event of a stream.

    Clients know a prompt that is too long by the first words of its message.
    """
    status = http_status(error)
    default = "api_error" if status >= 500 else "invalid_request_error"
    words = f"prompt is too long: {error}" if isinstance(error, PromptTooLong) else str(error)
    fields = {"type": _ANTHROPIC_TYPES.get(status, default), "message": words}
    return {"type": "error", "error": fields, "request_id": request_id}


def ollama_error(error: JserveError, request_id: str) -> dict[str, object]:
    """Ollama's error object, for a body or a line of a stream."""
    return {"error": str(error)}


def is_messages_path(path: str) -> bool:
    """Whether a URL's path is one of the Anthropic API."""
    return path == MESSAGES_PATH or path.startswith(f"{MESSAGES_PATH}/")


def form_of_path(path: str) -> ErrorForm:
    """The form that clients of a URL's path expect."""
    if is_messages_path(path):
        return anthropic_error
    return ollama_error if path.startswith(f"{OLLAMA_PATH}/") else openai_error


def http_status(error: JserveError) -> int:
    """The HTTP status of a response that is `error`."""
    return error.status if isinstance(error, HttpError) else wire_status(error).http


def error_json(error: JserveError, scope: Scope | None = None) -> dict[str, object]:
    """The object of `error` as the API of the request has it; OpenAI's before there is a request.

    It is a body, or an event of a stream.
    """
    if scope is None:
        return openai_error(error, "")
    return form_of_path(scope["path"])(error, scope.get("request_id", ""))


def error_response(error: JserveError, scope: Scope | None = None) -> Response:
    """The whole HTTP response to `error`, with Retry-After or WWW-Authenticate where due.

    `scope` is the request's; None where its first line was not read.
    """
    status = http_status(error)
    headers: dict[str, str] = {}
    retry_after_s = getattr(error, "retry_after_s", None)
    if retry_after_s is not None:
        headers["retry-after"] = str(
            max(1, math.ceil(retry_after_s))
        )  # the header has whole seconds
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    if status == 413:
        headers["connection"] = "close"
    return Response(
        orjson.dumps(error_json(error, scope)),
        status_code=status,
        headers=headers,
        media_type="application/json",
    )


def unrouted(request: Request, status: int) -> HttpError:
    """The error of a URL or a method that no route takes."""
    code, words = _REASONS[status]
    path = request.url.path[:200]
    return HttpError(status, words.format(method=request.method, path=path), code=code)
