"""Chats of `jserve.v1.Inference`: reads a `Chat`, and writes what its answer consists of."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import orjson

from jserve.core.errors import RequestError
from jserve.gateway.conversation import Conversation, PreparedChat
from jserve.gateway.messages import check_num_messages, checked_variables
from jserve.gateway.output import OutputDelta
from jserve.gateway.pauses import Pauses
from jserve.gateway.reasoning.format import ReasoningPart
from jserve.gateway.request_plane import RequestPlane
from jserve.gateway.tools.check import check_choice, check_num_tools, check_tools
from jserve.gateway.tools.format import CallPart, ChoiceMode, TextPart, Tool, ToolChoice
from jserve.gateway.validation import is_deeper
from jserve.proto import inference_pb2

_MAX_JSON_CHARS = 1 << 20  # of one text; it is parsed in a few milliseconds
_Choice = inference_pb2.ToolChoice
_MODES = {
    _Choice.MODE_UNSPECIFIED: ChoiceMode.AUTO,
    _Choice.MODE_NONE: ChoiceMode.NONE,
    _Choice.MODE_AUTO: ChoiceMode.AUTO,
    _Choice.MODE_REQUIRED: ChoiceMode.REQUIRED,
    _Choice.MODE_NAMED: ChoiceMode.NAMED,
}


async def read_chat(plane: RequestPlane, chat: inference_pb2.Chat) -> Conversation:
    """Reads a conversation, without what stands beside it in a request.

    Texts of JSON are parsed with pauses between them. Raises RequestError that names the field.
    """
    check_num_messages(len(chat.messages), plane.config.max_chat_messages)
    check_num_tools(len(chat.tools))
    depth, pauses = plane.config.max_json_depth, Pauses()
    tools: list[Tool] = []
    for i, it in enumerate(chat.tools):
        parameters = _json_object(f"tools[{i}].parameters", it.parameters, depth)
        tools.append(Tool(it.name, it.description, parameters, it.strict))
        await pauses.end()
    choice = _choice(chat.tool_choice)
    check_choice(choice, check_tools(tools, name_field="name"), empty_field="tools")
    documents: list[dict[str, Any]] = []
    for i, text in enumerate(chat.documents):
        documents.append(_json_object(f"documents[{i}]", text, depth))
        await pauses.end()
    name = "template_variables"
    variables = checked_variables(name, _json_object(name, chat.template_variables, depth))
    return Conversation(
        messages=[_message(it) for it in chat.messages],
        tools=tools,
        tool_choice=choice,
        parallel_tool_calls=chat.parallel_tool_calls
        if chat.HasField("parallel_tool_calls")
        else True,
        max_reasoning_tokens=_reasoning_budget(chat),
        add_generation_prompt=_opens_answer(chat),
        continue_final_message=chat.continue_final_message,
        variables=variables,
        documents=documents or None,
        chat_template=chat.chat_template if chat.HasField("chat_template") else None,
    )


class ChatWriter:
    """Writes text, reasoning and calls of a chat's choices to responses. Owned by one answer."""

    def __init__(self, chat: PreparedChat, *, include_reasoning: bool, echo: str) -> None:
        """`echo` is a text that each choice begins with."""
        self._chat = chat
        self._include_reasoning = include_reasoning
        self._readers = [chat.reader() for _ in range(chat.generation.n)]
        self._echoes = [echo] * chat.generation.n  # that are still to be sent
        self.reasoning_tokens = 0  # of all choices so far

    def write(self, delta: OutputDelta, response: inference_pb2.GenerateResponse) -> None:
        """Sets what the delta's text says in its response."""
        read = self._readers[delta.index].feed(delta)
        self.reasoning_tokens += read.reasoning_tokens
        texts, self._echoes[delta.index] = [self._echoes[delta.index]], ""
        reasoning: list[str] = []
        for part in read.parts:
            match part:
                case ReasoningPart():
                    reasoning.append(part.text)
                case TextPart():
                    texts.append(part.text)
                case CallPart(index, name, arguments):
                    piece = response.tool_calls.add(index=index, arguments=arguments)
                    if name is not None:
                        piece.name, piece.id = name, self._chat.call_id()
        response.text = "".join(texts)
        response.reasoning = "".join(reasoning) if self._include_reasoning else ""
        response.finished_with_calls = read.finish == "tool_calls"


def without_echo(chat: PreparedChat) -> tuple[PreparedChat, str]:
    """The chat with the echo of its prompt taken out of what is read, and that echo.

    A prompt has markers of its own, in the descriptions of tools among others.
    """
    generation = chat.generation
    if not generation.echo:
        return chat, ""
    return replace(chat, generation=replace(generation, echo=False)), generation.prompt.text or ""


def _message(message: inference_pb2.ChatMessage) -> dict[str, Any]:
    """A message in OpenAI's form, unchecked; empty fields count as not set there."""
    return {
        "role": message.role,
        "content": message.content,
        "tool_calls": _calls(message.tool_calls) if message.tool_calls else None,
        "tool_call_id": message.tool_call_id,
        "name": message.name,
        "reasoning_content": message.reasoning,
    }


def _calls(calls: Iterable[inference_pb2.ToolCall]) -> list[dict[str, Any]]:
    return [{"id": it.id, "function": {"name": it.name, "arguments": it.arguments}} for it in calls]


def _choice(given: inference_pb2.ToolChoice) -> ToolChoice:
    mode = _MODES.get(given.mode)
    if mode is None:
        raise RequestError(f"tool_choice.mode {given.mode} is unknown", param="tool_choice")
    if (mode is ChoiceMode.NAMED) != bool(given.name):
        message = "tool_choice.name goes with MODE_NAMED, which needs it"
        raise RequestError(message, param="tool_choice")
    return ToolChoice(mode, given.name or None)


def _reasoning_budget(chat: inference_pb2.Chat) -> int | None:
    if not chat.HasField("max_reasoning_tokens"):
        return None
    budget, name = chat.max_reasoning_tokens, "max_reasoning_tokens"
    if budget < 0:
        raise RequestError(f"{name} must be at least 0, not {budget}", param=name)
    return budget


def _opens_answer(chat: inference_pb2.Chat) -> bool:
    """Whether the prompt ends with the beginning of an answer."""
    if not chat.HasField("add_generation_prompt"):
        return not chat.continue_final_message
    if chat.add_generation_prompt and chat.continue_final_message:
        name = "continue_final_message"
        raise RequestError(f"{name} and add_generation_prompt exclude each other", param=name)
    return chat.add_generation_prompt


def _json_object(name: str, text: str, max_depth: int) -> dict[str, Any]:
    """Parses the object in field `name`; an empty text is an empty object."""
    if not text:
        return {}
    if len(text) > _MAX_JSON_CHARS:
        message = f"{name} has {len(text)} characters; at most {_MAX_JSON_CHARS}"
        raise RequestError(message, param=name)
    try:
        value = orjson.loads(text)
    except ValueError as error:
        raise RequestError(f"{name} is not JSON: {error}", param=name) from None
    if not isinstance(value, dict):
        raise RequestError(f"{name} must be the JSON text of an object", param=name)
    if is_deeper(value, max_depth):
        raise RequestError(f"{name} is nested deeper than {max_depth} levels", param=name)
    return value
