"""Errors as gRPC statuses and as `Failure` messages."""

from typing import Any, NoReturn

import grpc

from jserve.core.errors import JserveError, Overloaded, Unavailable, wire_status
from jserve.proto import inference_pb2


def code_of(error: JserveError) -> grpc.StatusCode:
    """Status code of an error, from the one table of core."""
    return grpc.StatusCode[wire_status(error).grpc]


async def abort(context: Any, error: JserveError) -> NoReturn:
    """Ends a call with the error's status; when to retry, and the field, go into the trailers."""
    trailers: list[tuple[str, str]] = []
    if isinstance(error, Overloaded | Unavailable):
        trailers.append(("retry-after", f"{error.retry_after_s:g}"))
    param = getattr(error, "param", None)
    if param is not None:
        trailers.append(("jserve-param", str(param)))
    await context.abort(code_of(error), str(error), tuple(trailers))
    raise AssertionError("abort raises")


def make_failure(error: JserveError) -> inference_pb2.Failure:
    """Converts the error of one request of a stream."""
    retry_after_s = error.retry_after_s if isinstance(error, Overloaded | Unavailable) else 0.0
    number: int = code_of(error).value[0]
    return inference_pb2.Failure(code=number, message=str(error), retry_after_s=retry_after_s)
