"""What every chat API asks for, and the generation that answers it."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jserve.core.errors import RequestError
from jserve.core.request import ConstraintSpec
from jserve.gateway.chat_formats import ChatFormats
from jserve.gateway.chat_reader import ChatReader
from jserve.gateway.messages import checked_content
from jserve.gateway.output import GenerationRequest, Prompt
from jserve.gateway.prompts import Truncation
from jserve.gateway.request_plane import RequestPlane
from jserve.gateway.tenants import Caller
from jserve.gateway.tools.format import (
    AUTO,
    ChoiceMode,
    Tool,
    ToolChoice,
    ToolFormat,
    WantedCalls,
    own_schema,
)
from jserve.gateway.validation import SamplingFields, check_id_lists
from jserve.grammar.source import GrammarKind, GrammarSource
from jserve.grammar.text import parsed


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """A request for an answer to messages, read from whatever form an API has for it.

    Messages are OpenAI's, unchecked: `messages.check_messages` does it. None is unset: the model's
    default applies.
    """

    messages: Any
    tools: Sequence[Tool] = ()
    tool_choice: ToolChoice = AUTO
    parallel_tool_calls: bool = True
    structured: GrammarSource | None = None
    max_reasoning_tokens: int | None = None  # without effect on a model that does not reason
    sampling: SamplingFields = field(default_factory=SamplingFields)
    bad_words: Sequence[str] = ()  # `RequestPlane.with_bad_words` checks them
    stop: Any = None
    n: int = 1
    echo: bool = False  # the text of each choice starts with the prompt's
    priority: int | None = None
    cache_salt: Any = field(default=None, repr=False)
    default_max_tokens: int | None = None  # comes before the model's default
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    # For the template:
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    variables: Mapping[str, Any] = field(default_factory=dict[str, Any])
    documents: Sequence[Any] | None = None
    chat_template: str | None = None  # instead of the model's own
    truncation: Truncation | None = None

    @property
    def final_text(self) -> str:
        """The last message's text, if it is the assistant's; for messages that were checked."""
        last = self.messages[-1]
        content = last.get("content") if last.get("role") == "assistant" else None
        return checked_content("messages", content or "")


@dataclass(frozen=True, slots=True)
class PreparedChat:
    """A generation, and how the text of its choices is to be read."""

    generation: GenerationRequest
    formats: ChatFormats
    tools: Sequence[Tool]
    tool_choice: ToolChoice
    starts_inside: bool  # the prompt has opened the reasoning
    reasoning_end: tuple[int, ...]  # tokens that end it

    def reader(self) -> ChatReader:
        """Makes the reader of one choice."""
        calls = self.formats.tools
        parser = None if not self.tools or calls is None else calls.parser(self.tools)
        reasoning = self.formats.reasoning
        return ChatReader(
            None if reasoning is None else reasoning.parser(starts_inside=self.starts_inside),
            parser,
            named=self.tool_choice.mode is ChoiceMode.NAMED,
            reasoning_end=self.reasoning_end,
        )

    def call_id(self) -> str:
        """Makes the id of a call, in the form that the model's template takes back."""
        assert self.formats.tools is not None
        return self.formats.tools.call_id()


async def render(
    plane: RequestPlane,
    conversation: Conversation,
    *,
    caller: Caller,
    ignored: list[str] | None = None,
    most: int | None = None,
) -> Prompt:
    """Renders the messages with the tools, and tokenizes; at most `most` tokens, None: the context.

    Raises RequestError, for a template without tools among others, PromptTooLong or Unavailable.
    """
    tools = _used_tools(plane, conversation)
    return await plane.prompts.of_chat(
        conversation.messages,
        caller=caller,
        tools=tools,
        documents=conversation.documents,
        add_generation_prompt=conversation.add_generation_prompt,
        continue_final_message=conversation.continue_final_message,
        variables=conversation.variables,
        chat_template=conversation.chat_template,
        ignored=ignored,
        most=most,
        truncation=plane.prompts.bounded(conversation.truncation, conversation.sampling.max_tokens),
    )


async def prepare(
    plane: RequestPlane,
    conversation: Conversation,
    *,
    id: str,  # noqa: A002
    caller: Caller,
    ignored: list[str] | None = None,
) -> PreparedChat:
    """Renders, tokenizes, compiles what binds the answer, and resolves every default.

    The caller counts it first (`RequestPlane.preparing`). Unknown fields of messages are added to
    `ignored`, or refused without it. Raises what `render`, `RequestPlane.constraint` and
    `RequestPlane.prepare` raise.
    """
    formats = plane.formats
    tools = _used_tools(plane, conversation)
    prompt = await render(plane, conversation, caller=caller, ignored=ignored)
    continued = conversation.final_text if conversation.continue_final_message else ""
    inside = formats.reasoning is not None and formats.reasoning.starts_inside(
        prompt.text or "", continued=continued
    )
    constraint = await _constraint(plane, conversation, tools, caller)
    start, end = _markers(plane, inside=inside)
    most = conversation.max_reasoning_tokens
    if end and (constraint is not None or most is not None):
        constraint = replace(
            constraint or ConstraintSpec(),
            reasoning_start=start,
            reasoning_end=end,
            max_reasoning_tokens=most,
        )
    constraint = plane.with_bad_words(constraint, conversation.bad_words)
    generation = plane.prepare(
        id=id,
        prompt=prompt,
        sampling=check_id_lists(conversation.sampling, plane.info),
        caller=caller,
        constraint=constraint,
        stop=conversation.stop,
        n=conversation.n,
        echo=conversation.echo,
        priority=conversation.priority,
        skip_special_tokens=conversation.skip_special_tokens,
        include_stop_str_in_output=conversation.include_stop_str_in_output,
        default_max_tokens=conversation.default_max_tokens,
        cache_salt=conversation.cache_salt,
        shown_tokens=plane.marker_ids,
    )
    choice = conversation.tool_choice
    return PreparedChat(generation, formats, tools, choice, inside, end)


def _used_tools(plane: RequestPlane, conversation: Conversation) -> Sequence[Tool]:
    """The tools that the model is told of; none where none may be called."""
    if not conversation.tools or conversation.tool_choice.mode is ChoiceMode.NONE:
        return ()
    if plane.formats.tools is None:
        raise RequestError(
            "the model's chat template takes no tools, or writes calls in a form that is not known "
            "here; name one with gateway.tool_parser, or send tool_choice: none",
            param="tools",
        )
    return conversation.tools


async def _constraint(
    plane: RequestPlane, conversation: Conversation, tools: Sequence[Tool], caller: Caller
) -> ConstraintSpec | None:
    """What binds the answer: calls that must come, a form of the text, or one of both."""
    structured, calls = conversation.structured, plane.formats.tools
    if not tools or calls is None:
        return await plane.constraint(structured, caller)
    wanted = WantedCalls(
        tools=tools,
        choice=conversation.tool_choice,
        parallel=conversation.parallel_tool_calls,
        special=plane.special_ids,
    )
    if structured is None:
        text = calls.grammar(wanted)
        if text is None:
            return None
        return await plane.constraint(_of_tools(text), caller)
    if structured.kind not in (GrammarKind.JSON, GrammarKind.JSON_OBJECT):
        raise RequestError(
            f"{structured.field} beside tools binds the answer twice; a JSON schema may be beside "
            "them, or send tool_choice: none",
            param=structured.field,
        )
    await plane.constraint(structured, caller)  # so that an error names its field
    if wanted.choice.mode is ChoiceMode.AUTO:
        text = _either(calls, wanted, structured)
    else:  # the answer is calls alone
        text = calls.grammar(wanted) or ""
    bound = replace(_of_tools(text), whitespace=structured.whitespace, fit=structured.fit)
    return await plane.constraint(bound, caller)


def _either(calls: ToolFormat, wanted: WantedCalls, structured: GrammarSource) -> str:
    """Writes the grammar of calls or of a JSON answer, as the model likes."""
    required = replace(
        wanted,
        choice=ToolChoice(ChoiceMode.REQUIRED),
        argument_schema=lambda tool: own_schema(tool) if tool.strict else {"type": "object"},
    )
    text = calls.grammar(required)
    assert text is not None
    is_object = structured.kind is GrammarKind.JSON_OBJECT
    schema = {"type": "object"} if is_object else parsed(structured)
    text = re.sub(r"^start:", "calls:", text, count=1, flags=re.MULTILINE)
    return f"{text}answer: %json {json.dumps(schema)}\nstart: calls | answer\n"


def _of_tools(text: str) -> GrammarSource:
    return GrammarSource(kind=GrammarKind.GRAMMAR, value=text, field="tools")


def _markers(plane: RequestPlane, *, inside: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Token ids that begin and end reasoning; none where a grammar spans it, too."""
    reasoning = plane.formats.reasoning
    if reasoning is None or not reasoning.end:
        return (), ()
    start = () if inside else plane.text_ids(reasoning.start)
    return start, plane.text_ids(reasoning.end)
