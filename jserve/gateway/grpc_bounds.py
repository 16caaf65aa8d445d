"""Bounds of a call's request: the time until it comes, and its parts, counted before it is parsed.

Protobuf parses millions of empty parts in a third of a second, in which the event loop serves
nobody. The count stops at the bound, so it takes a few milliseconds whatever the message is.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import Message

from jserve.core.errors import RequestError
from jserve.gateway.grpc_errors import abort

_LARGE_BYTES = 64 << 10
_OURS = "/jserve.v1."  # other services expect messages of their own
_PACKED_BYTES = 64
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5


class TooManyParts:
    """Stands in place of a message that has more parts than any useful one; the call is refused."""

    def __init__(self, error: RequestError) -> None:
        self.error = error


def count_parts(data: bytes, descriptor: Any, most: int) -> int:
    """Counts fields of a message and of those in it, up to `most` + 1.

    Packed numbers count as one for each 64 bytes, since they are parsed so much faster. Bytes that
    are no message count as they look: the parser refuses them.
    """
    count = 0
    kinds: dict[tuple[Any, int], tuple[Any, bool]] = {}
    waiting: list[tuple[int, int, Any]] = [(0, len(data), descriptor)]
    while waiting and count <= most:
        position, end, kind = waiting.pop()
        while position < end and count <= most:
            count += 1
            tag = data[position]  # most numbers are of one byte
            position += 1
            if tag > 127:
                tag, position = _varint(data, position - 1, end)
            wire = tag & 7
            if wire == _VARINT:
                _, position = _varint(data, position, end)
            elif wire == _LENGTH:
                size, position = _varint(data, position, end)
                if size:
                    nested, is_packed = kinds.get((kind, tag)) or _kind(kinds, kind, tag)
                    if nested is not None:
                        waiting.append((position, min(position + size, end), nested))
                    elif is_packed:
                        count += size // _PACKED_BYTES
                    position += size
            elif wire in (_FIXED64, _FIXED32):
                position += 8 if wire == _FIXED64 else 4
            else:
                break
    return min(count, most + 1)


def _kind(kinds: dict[tuple[Any, int], tuple[Any, bool]], kind: Any, tag: int) -> tuple[Any, bool]:
    """Remembers a field's kind of message, or None, and whether it is of packed numbers."""
    field = kind.fields_by_number.get(tag >> 3)
    found = (None, False) if field is None else (field.message_type, field.is_packed)
    kinds[kind, tag] = found
    return found


def _varint(data: bytes, position: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while position < end:
        byte = data[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128 or shift > 63:
            break
        shift += 7
    return value, position


class BoundedMessages(grpc.aio.ServerInterceptor):
    """Refuses messages of more than `most` parts."""

    def __init__(self, most: int) -> None:
        self._most = most

    async def intercept_service(
        self, continuation: Any, handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        """Puts the count before the parser of a method's requests."""
        handler = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith(_OURS):
            return handler
        parse = handler.request_deserializer
        kind = getattr(parse, "__self__", None)  # `FromString` is a method of its message's class
        if not (isinstance(kind, type) and issubclass(kind, Message)):
            return handler
        changed: dict[str, Any] = {"request_deserializer": lambda data: self._parse(data, kind)}
        for name in ("unary_unary", "unary_stream"):
            if getattr(handler, name) is not None:
                changed[name] = _refusing(getattr(handler, name))
        return handler._replace(**changed)

    def _parse(self, data: bytes, kind: type[Message]) -> Message | TooManyParts:
        large = len(data) > _LARGE_BYTES
        if large and count_parts(data, kind.DESCRIPTOR, self._most) > self._most:
            message = f"the message has more than {self._most} parts; send fewer"
            return TooManyParts(RequestError(message))
        return kind.FromString(data)


def _refusing(method: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    async def call(request: Any, context: Any) -> Any:
        if isinstance(request, TooManyParts):
            await abort(context, request.error)
        return await method(request, context)

    return call


class AwaitedMessages(grpc.aio.ServerInterceptor):
    """Ends calls of one request whose request does not come within `timeout_s`.

    gRPC reads the request of such a call before it calls the method, and waits for ever. So the
    method becomes one that reads a stream, which looks the same to the client, and whose first
    message is the request. A method that takes a stream stays as it is: its client may have nothing
    to ask yet.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s

    async def intercept_service(
        self, continuation: Any, handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        """Puts the wait before a method that takes one request."""
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_streaming:
            return handler
        if handler.response_streaming:
            make, method = grpc.stream_stream_rpc_method_handler, handler.unary_stream
        else:
            make, method = grpc.stream_unary_rpc_method_handler, handler.unary_unary

        async def call(requests: AsyncIterator[Any], context: Any) -> Any:
            return await method(await self._first(requests, context), context)

        return make(call, handler.request_deserializer, handler.response_serializer)

    async def _first(self, requests: AsyncIterator[Any], context: Any) -> Any:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await anext(requests)
        except TimeoutError:
            message = f"the request did not come within {self._timeout_s:g} s"
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, message)
        except StopAsyncIteration:
            await abort(context, RequestError("the call ended without a request; send one"))
