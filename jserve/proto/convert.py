"""Converts between the dataclasses of core and the messages of proto, in both directions.

Floats become float32 on the way, which is what the device computes with.
"""

from collections.abc import Callable, Iterable, Mapping, MutableSequence, Sequence
from dataclasses import fields
from typing import Any

from google.protobuf.message import Message

from jserve.core.errors import (
    EngineError,
    JserveError,
    Overloaded,
    PromptTooLong,
    RequestError,
    Unavailable,
)
from jserve.core.logprobs import LogprobBytes, PackedLogprobs
from jserve.core.request import (
    ConstraintSpec,
    EngineInfo,
    FinishReason,
    Request,
    SamplingParams,
    SequenceUpdate,
    TokenLogprobs,
)
from jserve.core.stats import EngineStats
from jserve.proto import engine_pb2, types_pb2

TokenWriter = Callable[[types_pb2.TokenLogprob, int], None]

FINISH_TO_PROTO = {
    FinishReason.STOP: types_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: types_pb2.FINISH_REASON_LENGTH,
    FinishReason.ABORT: types_pb2.FINISH_REASON_ABORT,
    FinishReason.ERROR: types_pb2.FINISH_REASON_ERROR,
}
_FINISH_FROM_PROTO = {number: reason for reason, number in FINISH_TO_PROTO.items()}


_SAMPLING_FIELDS = tuple(field.name for field in fields(SamplingParams))
_OPTIONAL_FIELDS = tuple(field.name for field in fields(SamplingParams) if field.default is None)
_NESTED_FIELDS = ("sampling", "constraint")  # messages of their own
_REQUEST_FIELDS = tuple(it.name for it in fields(Request) if it.name not in _NESTED_FIELDS)
_CONSTRAINT_FIELDS = tuple(field.name for field in fields(ConstraintSpec))
_INFO_FIELDS = tuple(field.name for field in fields(EngineInfo))
_STATS_FIELDS = tuple(field.name for field in fields(EngineStats))


def sampling_to_proto(sampling: SamplingParams) -> types_pb2.SamplingParams:
    """Sets every field that is not None."""
    values = _to_fields(sampling, _SAMPLING_FIELDS)
    values["logit_bias"] = dict(sampling.logit_bias)
    return types_pb2.SamplingParams(**values)


def sampling_from_proto(message: types_pb2.SamplingParams) -> SamplingParams:
    """The inverse of `sampling_to_proto`; every field that may not be None must be set."""
    values = _from_fields(message, _SAMPLING_FIELDS)
    values |= {name: None for name in _OPTIONAL_FIELDS if not message.HasField(name)}
    return SamplingParams(**values)


def request_to_proto(request: Request) -> engine_pb2.EngineRequest:
    return _request_to_proto(request, sampling_to_proto(request.sampling))


def _request_to_proto(
    request: Request, sampling: types_pb2.SamplingParams
) -> engine_pb2.EngineRequest:
    message = engine_pb2.EngineRequest(**_to_fields(request, _REQUEST_FIELDS), sampling=sampling)
    if request.constraint is not None:
        values = _to_fields(request.constraint, _CONSTRAINT_FIELDS)
        values["bad_sequences"] = [types_pb2.TokenIds(ids=it) for it in values["bad_sequences"]]
        message.constraint.CopyFrom(engine_pb2.Constraint(**values))
    return message


class RequestWriter:
    """`request_to_proto` for many requests: the choices of one share their sampling's message.

    It may hold lists as long as the vocabulary, which take milliseconds to convert.
    """

    def __init__(self) -> None:
        self._sampling: SamplingParams | None = None
        self._message = types_pb2.SamplingParams()

    def write(self, request: Request) -> engine_pb2.EngineRequest:
        if request.sampling is not self._sampling:
            self._message = sampling_to_proto(request.sampling)
            self._sampling = request.sampling
        return _request_to_proto(request, self._message)


class RequestReader:
    """`request_from_proto` for many requests: those in a row with equal sampling share it.

    So 128 choices keep one list of ids, not 128.
    """

    def __init__(self) -> None:
        self._raw = b""
        self._sampling: SamplingParams | None = None

    def read(self, message: engine_pb2.EngineRequest) -> Request:
        raw = message.sampling.SerializeToString()
        if self._sampling is None or raw != self._raw:
            self._raw, self._sampling = raw, sampling_from_proto(message.sampling)
        return _request(message, self._sampling)


def request_from_proto(message: engine_pb2.EngineRequest) -> Request:
    return _request(message, sampling_from_proto(message.sampling))


def _request(message: engine_pb2.EngineRequest, sampling: SamplingParams) -> Request:
    values = _from_fields(message, _REQUEST_FIELDS)
    if not message.HasField("deadline_s"):
        values["deadline_s"] = None
    if message.HasField("constraint"):
        values["constraint"] = _constraint(message.constraint)
    return Request(**values, sampling=sampling)


def _constraint(message: engine_pb2.Constraint) -> ConstraintSpec:
    values = _from_fields(message, _CONSTRAINT_FIELDS)
    if not message.HasField("max_reasoning_tokens"):
        values["max_reasoning_tokens"] = None
    values["bad_sequences"] = tuple(tuple(it.ids) for it in message.bad_sequences)
    return ConstraintSpec(**values)


def _to_fields(value: object, names: Iterable[str]) -> dict[str, Any]:
    return {name: getattr(value, name) for name in names}


def _from_fields(message: Message, names: Iterable[str]) -> dict[str, Any]:
    """Reads the fields `names`; lists become tuples, maps become sorted tuples of pairs."""
    return {name: _as_tuple(getattr(message, name)) for name in names}


def _as_tuple(value: Any) -> Any:
    if isinstance(value, Mapping):
        return tuple(sorted(value.items()))
    return tuple(value) if isinstance(value, MutableSequence) else value


def logprobs_to_proto(
    logprobs: TokenLogprobs | None,
    message: types_pb2.TokenLogprobs,
    describe: TokenWriter | None = None,
) -> None:
    """Writes into `message`; None, for the first prompt token, leaves it empty.

    `describe` may add the text of each token.
    """
    if logprobs is None:
        return
    message.chosen.token_id = logprobs.token_id
    message.chosen.logprob = logprobs.logprob
    message.rank = logprobs.rank
    for token_id, logprob in logprobs.top:
        message.top.add(token_id=token_id, logprob=logprob)
    if describe is not None:
        describe(message.chosen, logprobs.token_id)
        for top in message.top:
            describe(top, top.token_id)


def _pack(
    logprobs: Sequence[TokenLogprobs | None] | None, message: engine_pb2.PackedLogprobs
) -> None:
    """Writes positions into `message`; for None it stays unset."""
    if logprobs is None:
        return
    packed = logprobs if isinstance(logprobs, PackedLogprobs) else PackedLogprobs(logprobs)
    message.SetInParent()
    for name, data in packed.to_bytes()._asdict().items():
        setattr(message, name, data)


def _unpack(message: engine_pb2.PackedLogprobs) -> PackedLogprobs[Any]:
    """The inverse of `_pack`, without an object per position; ValueError if it makes no sense."""
    return PackedLogprobs.from_bytes(
        LogprobBytes(message.ids, message.values, message.ranks, message.ends)
    )


def updates_to_proto(
    updates: Mapping[str, SequenceUpdate], response: engine_pb2.SessionResponse
) -> None:
    """Appends the updates of a step to a message, under the ids that they are given by."""
    for request_id, update in updates.items():
        message = response.updates.add(request_id=request_id, tokens=update.tokens)
        if update.finish is not None:
            message.finish = FINISH_TO_PROTO[update.finish]
        if update.queue_s is not None:
            message.queue_s = update.queue_s
        if update.error is not None:
            message.error = update.error
        message.cached_tokens = update.cached_tokens
        _pack(update.logprobs, message.logprobs)
        _pack(update.prompt_logprobs, message.prompt_logprobs)


def update_from_proto(message: engine_pb2.SequenceUpdate) -> SequenceUpdate:
    return SequenceUpdate(
        request_id=message.request_id,
        tokens=tuple(message.tokens),
        finish=_FINISH_FROM_PROTO[message.finish] if message.finish else None,
        logprobs=_unpack(message.logprobs) if message.HasField("logprobs") else None,
        prompt_logprobs=_unpack(message.prompt_logprobs)
        if message.HasField("prompt_logprobs")
        else None,
        queue_s=message.queue_s if message.HasField("queue_s") else None,
        error=message.error or None,
        cached_tokens=message.cached_tokens,
    )


def info_to_proto(info: EngineInfo) -> engine_pb2.EngineHello:
    return engine_pb2.EngineHello(**_to_fields(info, _INFO_FIELDS))


def info_from_proto(message: engine_pb2.EngineHello) -> EngineInfo:
    return EngineInfo(**_from_fields(message, _INFO_FIELDS))


def stats_to_proto(stats: EngineStats) -> engine_pb2.EngineStats:
    return engine_pb2.EngineStats(**_to_fields(stats, _STATS_FIELDS))


def stats_from_proto(message: engine_pb2.EngineStats) -> EngineStats:
    return EngineStats(**_from_fields(message, _STATS_FIELDS))


_REJECTION_KINDS: tuple[tuple[type[JserveError], engine_pb2.Rejection.Kind], ...] = (
    (PromptTooLong, engine_pb2.Rejection.KIND_TOO_LONG),
    (RequestError, engine_pb2.Rejection.KIND_INVALID),
    (Overloaded, engine_pb2.Rejection.KIND_OVERLOADED),
    (Unavailable, engine_pb2.Rejection.KIND_DRAINING),
)


def rejection_to_proto(request_id: str, error: JserveError) -> engine_pb2.Rejection:
    """Makes a refusal; an error that is the engine's fault has no kind."""
    kind = next((kind for cls, kind in _REJECTION_KINDS if isinstance(error, cls)), None)
    retry_after_s = error.retry_after_s if isinstance(error, Overloaded | Unavailable) else 0.0
    return engine_pb2.Rejection(
        request_id=request_id, kind=kind, message=str(error), retry_after_s=retry_after_s
    )


def error_from_rejection(message: engine_pb2.Rejection) -> JserveError:
    """Returns the typed error that the client of the request gets."""
    match message.kind:
        case engine_pb2.Rejection.KIND_TOO_LONG:
            return PromptTooLong(message.message, param="prompt")
        case engine_pb2.Rejection.KIND_INVALID:
            return RequestError(message.message)
        case engine_pb2.Rejection.KIND_OVERLOADED:
            return Overloaded(message.message, retry_after_s=message.retry_after_s)
        case engine_pb2.Rejection.KIND_DRAINING:
            return Unavailable(message.message, retry_after_s=message.retry_after_s)
        case _:
            return EngineError(message.message)
