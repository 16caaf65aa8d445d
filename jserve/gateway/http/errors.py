"""Errors as the OpenAI API words them, and their HTTP status and headers."""

import math

import orjson
from starlette.requests import Request
from starlette.responses import Response

from jserve.core.errors import JserveError, RequestError, wire_status

_REASONS = {
    404: ("unknown_url", "no such URL: {method} {path}; see /v1/models for a first one"),
    405: ("method_not_allowed", "{path} does not take {method}"),
}


class HttpError(RequestError):
    """A fault of the HTTP message itself, with the HTTP status that names it."""

    def __init__(self, status: int, message: str, *, code: str, param: str | None = None) -> None:
        super().__init__(message, param=param)
        self.status = status
        self.code = code


def error_json(error: JserveError) -> dict[str, object]:
    """The `{"error": {…}}` object of `error`, for a body or an event of a stream."""
    fields = {
        "message": str(error),
        "type": wire_status(error).openai_type,
        "param": error.param if isinstance(error, RequestError) else None,
        "code": error.code if isinstance(error, RequestError) else None,
    }
    return {"error": fields}


def error_response(error: JserveError) -> Response:
    """The whole HTTP response to `error`, with Retry-After or WWW-Authenticate where due."""
    status = error.status if isinstance(error, HttpError) else wire_status(error).http
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
        orjson.dumps(error_json(error)),
        status_code=status,
        headers=headers,
        media_type="application/json",
    )


def unrouted(request: Request, status: int) -> HttpError:
    """The error of a URL or a method that no route takes."""
    code, words = _REASONS[status]
    path = request.url.path[:200]
    return HttpError(status, words.format(method=request.method, path=path), code=code)
