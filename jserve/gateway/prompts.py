"""Prompts from what clients send: text, token ids or a conversation."""

import asyncio
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jserve.core.errors import RequestError
from jserve.core.request import EngineInfo
from jserve.gateway.chat import ChatTemplate
from jserve.gateway.config import GatewayConfig
from jserve.gateway.messages import Message, check_messages, tool_json, with_described_tools
from jserve.gateway.output import Prompt
from jserve.gateway.template_process import TemplateProcess
from jserve.gateway.tenants import LOCAL, Caller
from jserve.gateway.tokenizer import TextTokenizer, TooManyTokens
from jserve.gateway.tools.format import Tool
from jserve.gateway.tools.formats import takes_tools
from jserve.gateway.validation import check_prompt, prompt_too_long, token_ids

_LONG_TEXT_CHARS = 64 << 10  # longer texts are first checked by a lower bound of their tokens
WHOLE_CONTEXT = -1
_MOST_COUNTED = 1 << 18  # tokens that are only counted; more would hold the event loop


@dataclass(frozen=True, slots=True)
class Truncation:
    """How a prompt is shortened: to `length` tokens, the last ones unless `keeps_start`."""

    length: int  # WHOLE_CONTEXT: what the context has room for
    keeps_start: bool = False

    def cut(self, ids: Sequence[int]) -> Sequence[int]:
        """Returns the ids, or those that are kept of too many."""
        if len(ids) <= self.length:
            return ids
        return ids[: self.length] if self.keeps_start else ids[-self.length :]


class PromptMaker:
    """Renders and tokenizes beside the event loop; owns the processes of the chat template."""

    def __init__(
        self,
        tokenizer: TextTokenizer,
        template: ChatTemplate | None,
        config: GatewayConfig,
        info: Callable[[], EngineInfo],
    ) -> None:
        """`info` raises Unavailable until the engine was reached, and so does every prompt."""
        self._tokenizer = tokenizer
        self._template = template
        self._config = config
        self._info = info
        self._templates = None if template is None else TemplateProcess(template)

    def warm(self) -> None:
        """Starts what the first request would wait for; does not wait for it."""
        if self._templates is not None:
            self._templates.warm()

    def close(self) -> None:
        """Ends the processes that it has started."""
        if self._templates is not None:
            self._templates.close()

    @property
    def most_counted(self) -> int:
        """The most tokens of a text that is only tokenized, or detokenized."""
        return max(self._info().max_model_len, _MOST_COUNTED)

    async def of_text(
        self, text: str, *, add_special_tokens: bool | None = None, most: int | None = None
    ) -> Prompt:
        """Tokenizes one text; see `of_texts`."""
        prompts = await self.of_texts([text], add_special_tokens=add_special_tokens, most=most)
        return prompts[0]

    async def of_texts(
        self,
        texts: Sequence[str],
        *,
        add_special_tokens: bool | None = None,
        most: int | None = None,
        truncation: Truncation | None = None,
    ) -> list[Prompt]:
        """Tokenizes; None keeps the tokenizer's own habit of adding a BOS.

        A prompt that is truncated has no text.

        Raises:
            RequestError: a text is no valid Unicode.
            PromptTooLong: a text has more than `most` tokens; None stands for the context.
        """
        if most is None:
            most = self._info().max_model_len if truncation is None else self.most_counted
        for text in texts:
            _check_unicode(text)
            if len(text) > _LONG_TEXT_CHARS:
                least = await asyncio.to_thread(self._tokenizer.least_tokens, text)
                if least > most:
                    raise prompt_too_long(f"at least {least}", most)
        try:
            encoded = await self._tokenizer.encode_all(
                texts, add_special_tokens=add_special_tokens, most=most
            )
        except TooManyTokens as error:
            raise prompt_too_long(str(error.num_tokens), most) from None
        prompts = [Prompt(tuple(ids), text) for ids, text in zip(encoded, texts, strict=True)]
        if truncation is None:
            return prompts
        return [
            it if len(it.ids) <= truncation.length else Prompt(tuple(truncation.cut(it.ids)))
            for it in prompts
        ]

    def of_ids(self, ids: Sequence[int], truncation: Truncation | None = None) -> Prompt:
        """Makes a prompt of token ids, which are checked."""
        kept = ids if truncation is None else truncation.cut(ids)
        return Prompt(check_prompt(kept, self._info()))

    def bounded(self, truncation: Truncation | None, max_tokens: Any) -> Truncation | None:
        """Returns the truncation with its length in tokens.

        WHOLE_CONTEXT leaves room for `max_tokens`, which is unchecked. Raises RequestError for a
        length that is longer than the context.
        """
        if truncation is None:
            return None
        context = self._info().max_model_len
        if truncation.length == WHOLE_CONTEXT:
            room = max_tokens if type(max_tokens) is int and 0 < max_tokens < context else 1
            return Truncation(context - room, truncation.keeps_start)
        if truncation.length > context:
            name = "truncate_prompt_tokens"
            message = f"{name} is {truncation.length}, but the model's context has {context} tokens"
            raise RequestError(message, param=name)
        return truncation

    async def detokenize(self, name: str, ids: Any) -> str:
        """Returns the text of `ids`, special tokens included; field `name` of a request has them.

        Raises RequestError if they are no ids of the vocabulary, or too many.
        """
        if isinstance(ids, Sequence) and len(ids) > self.most_counted:
            message = f"{name} has {len(ids)} ids; at most {self.most_counted}"
            raise RequestError(message, param=name)
        checked = token_ids(name, ids, self._info().vocab)
        return await self._tokenizer.decode_async(checked, skip_special_tokens=False)

    async def of_chat(
        self,
        messages: Any,
        *,
        caller: Caller = LOCAL,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
        tools: Sequence[Tool] = (),
        documents: Sequence[Any] | None = None,
        chat_template: str | None = None,
        ignored: list[str] | None = None,
        most: int | None = None,
        truncation: Truncation | None = None,
    ) -> Prompt:
        """Checks the messages, renders the model's chat template and tokenizes.

        `variables` are for the template, before those of the model. `chat_template` is one instead
        of the model's. With `continue_final_message` the prompt ends with the last message's text.
        Unknown fields of messages are added to `ignored`, or refused without it.

        The template writes the BOS itself, if the model wants one. RequestError if the model has
        no template; PromptTooLong as of `of_texts`.
        """
        checked = check_messages(
            messages, max_messages=self._config.max_chat_messages, ignored=ignored
        )
        if self._template is None or self._templates is None:
            raise RequestError(
                "the model has no chat template; use completions with a prompt instead of chat "
                "messages",
                param="messages",
            )
        given, mark = None, ""
        if not takes_tools(chat_template or self._template.source):
            checked = with_described_tools(checked, tools)
        elif tools:
            given = [tool_json(tool) for tool in tools]
        if continue_final_message:
            add_generation_prompt = False
            checked, mark = _marked(checked)
        text = await self._templates.render(
            checked,
            tenant=caller.name,
            add_generation_prompt=add_generation_prompt,
            variables=dict(variables or {}),
            tools=given,
            documents=documents,
            source=chat_template,
        )
        if continue_final_message:
            text = _up_to(text, mark)
        if truncation is not None:
            most = self.most_counted
        prompt = await self.of_text(text, add_special_tokens=False, most=most)
        return prompt if truncation is None else Prompt(tuple(truncation.cut(prompt.ids)), text)


def _marked(messages: Sequence[Message]) -> tuple[list[Message], str]:
    """The messages with a mark behind the text of the last one, and the mark."""
    mark = secrets.token_hex(16)
    *others, last = messages
    return [*others, {**last, "content": last["content"] + mark}], mark


def _up_to(text: str, mark: str) -> str:
    """The rendered text without the mark, and what the template writes behind it."""
    end = text.rfind(mark)
    if end < 0:
        raise RequestError(
            "continue_final_message: the chat template leaves the last message out",
            param="continue_final_message",
        )
    return text[:end]


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"the text holds a lone surrogate at character {error.start}; send valid Unicode",
            param="prompt",
        ) from error
