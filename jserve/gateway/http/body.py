"""Reading a JSON request body, with bounds on its type, size and depth."""

from typing import Any

import orjson
from starlette.requests import Request

from jserve.core.errors import RequestError
from jserve.gateway.config import GatewayConfig
from jserve.gateway.http.errors import HttpError
from jserve.gateway.http.event_stream import ClientGone
from jserve.gateway.validation import is_deeper

# A client that is cut off while it sends often never reads the answer, so bytes beyond the limit
# are read and dropped, up to this many times the limit.
_DRAIN_FACTOR = 16


async def read_body(request: Request, config: GatewayConfig) -> bytes:
    """The bytes of a JSON body.

    Raises:
        HttpError: the content type is not JSON, or the body is too large.
        ClientGone: the client left before it had sent everything.
    """
    _check_type(request)
    return await _read(request, config.max_body_bytes)


def parse_object(body: bytes, max_depth: int) -> dict[str, Any]:
    """The JSON object in a body: finite numbers, valid Unicode; of equal keys the last wins.

    Raises RequestError if it is not a JSON object, or is nested too deeply.
    """
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        message = f"the body is not valid JSON: {error}" if body else "the body is empty"
        raise RequestError(message) from error
    if not isinstance(value, dict):
        raise RequestError("the body must be a JSON object")
    if is_deeper(value, max_depth):
        raise RequestError(f"the body is nested deeper than {max_depth} levels")
    return value


def _check_type(request: Request) -> None:
    given = request.headers.get("content-type", "")
    media_type = given.partition(";")[0].strip().lower()
    if media_type != "application/json":
        message = f"send Content-Type: application/json, not {given[:100] or 'nothing'!r}"
        raise HttpError(415, message, code="unsupported_media_type")
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        message = f"Content-Encoding {encoding[:40]!r} is not supported; send the body as it is"
        raise HttpError(415, message, code="unsupported_media_type")


async def _read(request: Request, limit: int) -> bytes:
    chunks: list[bytes] = []
    size = 0
    more = True
    while more and size <= limit * _DRAIN_FACTOR:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        chunk = message.get("body", b"")
        size += len(chunk)
        if size <= limit:
            chunks.append(chunk)
        more = message.get("more_body", False)
    if size > limit:
        raise HttpError(413, f"the body is larger than {limit} bytes", code="request_too_large")
    return b"".join(chunks)
