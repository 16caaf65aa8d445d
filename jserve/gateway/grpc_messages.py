"""Converts messages of `jserve.v1.Inference` to requests and deltas to messages."""

from collections.abc import AsyncIterable, AsyncIterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import grpc
import grpc.aio

from jserve.core.errors import RequestError
from jserve.core.request import FinishReason, TokenLogprobs
from jserve.gateway.conversation import prepare, render
from jserve.gateway.grpc_chat import ChatWriter, read_chat, without_echo
from jserve.gateway.output import num_logprobs
from jserve.gateway.pauses import LARGE, Pauses
from jserve.gateway.request_plane import GenerationRequest, OutputDelta, Prompt, RequestPlane
from jserve.gateway.tenants import Caller
from jserve.gateway.tokenizer import TextTokenizer
from jserve.gateway.validation import SamplingFields
from jserve.grammar.source import GrammarKind, GrammarSource, Whitespace
from jserve.proto import inference_pb2, types_pb2
from jserve.proto.convert import FINISH_TO_PROTO, logprobs_to_proto

_PIECE_POSITIONS = 16  # of up to 20 alternatives take less than a millisecond
_Spaces = inference_pb2.StructuredOutput
_WHITESPACE = {
    _Spaces.WHITESPACE_NONE: Whitespace.NONE,
    _Spaces.WHITESPACE_ONE: Whitespace.ONE,
    _Spaces.WHITESPACE_ANY: Whitespace.ANY,
}


def sampling_fields(message: types_pb2.SamplingParams) -> SamplingFields:
    """Reads sampling fields; those not set stay None, an empty list counts as not set."""
    # Lists and maps are counted before anybody copies them, so they are not copied here.
    return SamplingFields(**{field.name: value for field, value in message.ListFields()})


async def parse_prompt(
    plane: RequestPlane,
    message: inference_pb2.GenerateRequest | inference_pb2.TokenizeRequest,
    caller: Caller,
) -> Prompt:
    """Tokenizes text, renders a chat, takes ids as they are; RequestError if there is no input."""
    only_counted = isinstance(message, inference_pb2.TokenizeRequest)
    most = plane.prompts.most_counted if only_counted else None
    add_special_tokens = (
        message.add_special_tokens if message.HasField("add_special_tokens") else None
    )
    match message.WhichOneof("input"):
        case "text":
            return await plane.prompts.of_text(
                message.text, add_special_tokens=add_special_tokens, most=most
            )
        case "chat":
            conversation = await read_chat(plane, message.chat)
            return await render(plane, conversation, caller=caller, most=most)
        case "token_ids" if isinstance(message, inference_pb2.GenerateRequest):
            return plane.prompts.of_ids(message.token_ids.ids)
        case _:
            raise RequestError("no input; set text, token_ids or chat", param="input")


def grammar_source(message: inference_pb2.GenerateRequest) -> GrammarSource | None:
    """Reads what binds the answer; RequestError if the message names nothing."""
    if not message.HasField("structured_output"):
        return None
    given = message.structured_output
    field = given.WhichOneof("kind")
    if field is None or (field == "json_object" and not given.json_object):
        fault = "structured_output is empty; set json_schema, json_object, regex, choice, grammar "
        raise RequestError(fault + "or structural_tag", param="structured_output")
    kind = GrammarKind.JSON if field == "json_schema" else GrammarKind(field)
    value = getattr(given, field)
    whitespace = _WHITESPACE.get(given.whitespace, Whitespace.ONE)
    return GrammarSource(
        kind=kind,
        value=list(value.values) if kind is GrammarKind.CHOICE else value,
        field=f"structured_output.{field}",
        whitespace=given.whitespace_pattern if given.HasField("whitespace_pattern") else whitespace,
        fit=given.fit,
    )


@dataclass(frozen=True, slots=True)
class ParsedGeneration:
    """A generation, and what writes its choices if it answers a chat."""

    generation: GenerationRequest
    writer: ChatWriter | None = None


async def parse_generation(
    plane: RequestPlane, message: inference_pb2.GenerateRequest, request_id: str, caller: Caller
) -> ParsedGeneration:
    """Parses and validates; see `RequestPlane.prepare` and `conversation.prepare` for errors."""
    plane.check_model(message.model)
    sampling, options = sampling_fields(message.sampling), _options(plane, message)
    if message.WhichOneof("input") == "chat":
        chat = message.chat
        with plane.preparing(caller, 1, message.n or None):
            conversation = replace(
                await read_chat(plane, chat),
                structured=grammar_source(message),
                sampling=sampling,
                **options,
            )
            prepared = await prepare(plane, conversation, id=request_id, caller=caller)
        prepared, echo = without_echo(prepared)
        shown = chat.include_reasoning if chat.HasField("include_reasoning") else True
        writer = ChatWriter(prepared, include_reasoning=shown, echo=echo)
        return ParsedGeneration(prepared.generation, writer)
    with plane.preparing(caller, 1, message.n or None):
        prompt = await parse_prompt(plane, message, caller)
        constraint = await plane.constraint(grammar_source(message), caller)
    generation = plane.prepare(
        id=request_id,
        prompt=prompt,
        caller=caller,
        constraint=constraint,
        sampling=sampling,
        **options,
    )
    return ParsedGeneration(generation)


def _options(plane: RequestPlane, message: inference_pb2.GenerateRequest) -> dict[str, Any]:
    """Options of every input; None where they are not set."""
    given: dict[str, Any] = {
        name: getattr(message, name) if message.HasField(name) else None
        for name in ("skip_special_tokens", "include_stop_str_in_output", "cache_salt")
    }
    return given | {
        "stop": list(message.stop[: plane.config.max_stop_strings + 1]),
        "n": message.n or 1,
        "priority": message.priority,
        "echo": message.echo,
    }


class EncodedResponses(grpc.aio.ServerInterceptor):
    """Sends a response that is bytes as it is: `encode` has made the message already."""

    async def intercept_service(
        self, continuation: Any, handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        """Puts the check before the serializer of a method's responses."""
        handler = await continuation(handler_call_details)
        if handler is None or handler.response_serializer is None:
            return handler
        serialize = handler.response_serializer
        return handler._replace(
            response_serializer=lambda it: it if isinstance(it, bytes) else serialize(it)
        )


def make_response(delta: OutputDelta, request_id: str) -> inference_pb2.GenerateResponse:
    """Makes the message for one delta, without log-probabilities; those are for `encode`."""
    response = inference_pb2.GenerateResponse(
        request_id=request_id, index=delta.index, text=delta.text, token_ids=delta.token_ids
    )
    if delta.finish is not None:
        response.finish_reason = FINISH_TO_PROTO[delta.finish]
    if delta.stop_reason is not None:
        response.stop_reason = str(delta.stop_reason)
    return response


async def encode(
    response: inference_pb2.GenerateResponse,
    delta: OutputDelta,
    tokenizer: TextTokenizer,
    pauses: Pauses,
) -> bytes:
    """Serializes a response together with the log-probabilities of its delta.

    20 for each of 4,000 tokens take 200 ms, so they are built in pieces with pauses between them.
    Concatenated pieces parse as one message: protobuf joins the items of repeated fields.
    """

    def describe(message: types_pb2.TokenLogprob, token_id: int) -> None:
        message.token = tokenizer.token_text(token_id)
        message.raw = tokenizer.token_bytes(token_id)

    encoded = [response.SerializeToString()]
    piece = inference_pb2.GenerateResponse()
    positions: Sequence[TokenLogprobs | None]
    for positions, field in (
        (delta.logprobs or (), piece.logprobs),
        (delta.prompt_logprobs or (), piece.prompt_logprobs),
    ):
        for position in positions:
            logprobs_to_proto(position, field.add(), describe)
            if len(field) == _PIECE_POSITIONS:
                encoded.append(piece.SerializeToString())
                del field[:]
                await pauses.end()
        encoded.append(piece.SerializeToString())
        del field[:]
    return b"".join(encoded)


async def responses(
    plane: RequestPlane,
    parsed: ParsedGeneration,
    deltas: AsyncIterable[OutputDelta],
    started_s: float,
) -> AsyncIterator[bytes]:
    """Yields the serialized messages of a generation; the last one carries usage and timings.

    If `deltas` ends before its end, the choices that still ran finish with ABORT. While
    nobody asks for the next message the engine's updates are merged, so a reader that is slow gets
    fewer, larger ones.
    """
    generation, writer = parsed.generation, parsed.writer
    unfinished = set(range(generation.n))
    num_output = num_cached = 0
    queue_s = 0.0
    ttft_s: float | None = None

    def respond(delta: OutputDelta) -> inference_pb2.GenerateResponse:
        message = make_response(delta, generation.id)
        if writer is not None:
            writer.write(delta, message)
        if delta.finish is not None:
            complete(message)
        return message

    def complete(message: inference_pb2.GenerateResponse) -> None:
        unfinished.discard(message.index)
        if not unfinished:
            if writer is not None:
                message.usage.reasoning_tokens = writer.reasoning_tokens
            message.usage.prompt_tokens = len(generation.prompt.ids)
            message.usage.completion_tokens = num_output
            message.usage.cached_tokens = num_cached
            message.timings.queue_s = queue_s
            message.timings.ttft_s = ttft_s or 0.0
            message.timings.total_s = plane.clock.now_s() - started_s

    pauses = Pauses()  # a reader that was slow gets many large deltas at once
    async for delta in deltas:
        if ttft_s is None:
            ttft_s = plane.clock.now_s() - started_s
        num_output += len(delta.token_ids)
        num_cached += delta.cached_tokens if delta.index == 0 else 0  # the prompt counts once
        queue_s = max(queue_s, delta.queue_s or 0.0)
        pauses.start()
        message = respond(delta)
        turn = plane.large_answers if num_logprobs(delta) > LARGE else nullcontext()
        async with turn:
            data = await encode(message, delta, plane.tokenizer, pauses)
        await pauses.end()
        yield data
    for index in sorted(unfinished):
        message = respond(OutputDelta(index, "", (), finish=FinishReason.ABORT))
        yield message.SerializeToString()
