"""The messages of `jserve.v1.Inference`, to and from what the generator takes and gives."""

from collections.abc import AsyncIterable, AsyncIterator, Mapping, MutableSequence, Sequence
from typing import Any

from jserve.core.errors import RequestError
from jserve.core.request import FinishReason, TokenLogprobs
from jserve.gateway.generation import Generation, Generator, Piece, Prompt
from jserve.gateway.tokenizer import TextTokenizer
from jserve.gateway.validation import SamplingFields
from jserve.proto import inference_pb2, types_pb2
from jserve.proto.convert import FINISH_TO_PROTO, logprobs_to_proto


def sampling_fields(message: types_pb2.SamplingParams) -> SamplingFields:
    """Fields that are not set stay None; an empty list counts as not set."""
    return SamplingFields(
        **{field.name: _plain(value) for field, value in message.ListFields()}  # the set ones
    )


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, MutableSequence) else value


async def prompt_of(
    generator: Generator,
    message: inference_pb2.GenerateRequest | inference_pb2.TokenizeRequest,
) -> Prompt:
    """Tokenizes text, renders a chat, takes ids as they are; RequestError if there is no input."""
    add_special_tokens = (
        message.add_special_tokens if message.HasField("add_special_tokens") else None
    )
    match message.WhichOneof("input"):
        case "text":
            return await generator.text_prompt(message.text, add_special_tokens=add_special_tokens)
        case "chat":
            messages = [{"role": m.role, "content": m.content} for m in message.chat.messages]
            return await generator.chat_prompt(messages)
        case "token_ids" if isinstance(message, inference_pb2.GenerateRequest):
            return generator.token_prompt(list(message.token_ids.ids))
        case _:
            raise RequestError("no input; set text, token_ids or chat", param="input")


async def generation_of(
    generator: Generator, message: inference_pb2.GenerateRequest, request_id: str
) -> Generation:
    """Parses and validates; see `Generator.prepare` for the errors."""
    generator.check_model(message.model)
    return generator.prepare(
        id=request_id,
        prompt=await prompt_of(generator, message),
        sampling=sampling_fields(message.sampling),
        stop=list(message.stop),
        n=message.n or None,
        priority=message.priority,
        echo=message.echo,
        skip_special_tokens=message.skip_special_tokens
        if message.HasField("skip_special_tokens")
        else None,
        include_stop_str_in_output=message.include_stop_str_in_output
        if message.HasField("include_stop_str_in_output")
        else None,
    )


def response_of(
    piece: Piece, request_id: str, tokenizer: TextTokenizer
) -> inference_pb2.GenerateResponse:
    """The message for one piece; usage and timings are for the caller to add to the last one."""

    def describe(message: types_pb2.TokenLogprob, token_id: int) -> None:
        message.token = tokenizer.token_text(token_id)
        message.raw = tokenizer.token_bytes(token_id)

    response = inference_pb2.GenerateResponse(
        request_id=request_id, index=piece.index, text=piece.text, token_ids=piece.token_ids
    )
    if piece.finish is not None:
        response.finish_reason = FINISH_TO_PROTO[piece.finish]
    if piece.stop_reason is not None:
        response.stop_reason = str(piece.stop_reason)
    positions: Sequence[TokenLogprobs | None]
    for positions, field in (
        (piece.logprobs or (), response.logprobs),
        (piece.prompt_logprobs or (), response.prompt_logprobs),
    ):
        for position in positions:
            logprobs_to_proto(position, field.add(), describe)
    return response


async def responses(
    generator: Generator,
    generation: Generation,
    pieces: AsyncIterable[Piece],
    started_s: float,
) -> AsyncIterator[inference_pb2.GenerateResponse]:
    """The messages of a generation; the last one carries usage and timings.

    If `pieces` ends before its end, the choices that still ran finish with ABORT. While
    nobody asks for the next message the engine's news are merged, so a reader that is slow gets
    fewer, larger ones.
    """
    unfinished = set(range(generation.n))
    num_output = 0
    queue_s = 0.0
    ttft_s: float | None = None

    def complete(message: inference_pb2.GenerateResponse) -> inference_pb2.GenerateResponse:
        unfinished.discard(message.index)
        if not unfinished:
            message.usage.prompt_tokens = len(generation.prompt.ids)
            message.usage.completion_tokens = num_output
            message.timings.queue_s = queue_s
            message.timings.ttft_s = ttft_s or 0.0
            message.timings.total_s = generator.clock.now_s() - started_s
        return message

    async for piece in pieces:
        if ttft_s is None:
            ttft_s = generator.clock.now_s() - started_s
        num_output += len(piece.token_ids)
        queue_s = max(queue_s, piece.queue_s or 0.0)
        message = response_of(piece, generation.id, generator.tokenizer)
        yield message if piece.finish is None else complete(message)
    for index in sorted(unfinished):
        aborted = Piece(index, "", (), finish=FinishReason.ABORT)
        yield complete(response_of(aborted, generation.id, generator.tokenizer))
