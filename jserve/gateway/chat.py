"""Renders chat messages to one prompt text by the model's own Jinja template.

The environment is Hugging Face's (transformers.utils.chat_template_utils), so that a template
renders the same here; the sandbox keeps a template from reaching Python and from growing without
bound.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from jserve.core.errors import ConfigError, RequestError

MAX_RENDERED_CHARS = 16 << 20
_MAX_ERROR_CHARS = 1000  # of a template's own message
_MESSAGE_FIELDS = frozenset({"role", "content", "name", "reasoning_content"})
# Fields of answers, which clients send back with the message. They say nothing to a template.
_REPLAYED_FIELDS = frozenset(
    {
        *("annotations", "cache_control", "created_at", "id", "images", "parsed", "phase"),
        *("provider_specific_fields", "reasoning_details", "status", "thinking_blocks"),
    }
)
_TOOL_FIELDS = frozenset({"tool_calls", "function_call", "tool_call_id"})
# Types of a part that is text, and the field that holds it.
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}


class _TemplateError(Exception):
    """`raise_exception(message)` in a template."""


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}…{% endgeneration %}`, which marks the assistant's tokens for training."""

    tags = {"generation"}  # noqa: RUF012  the attribute Jinja declares

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        """Drops the tags and keeps what is between them."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox, which also refuses operators that make large values out of small ones."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(
        self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any
    ) -> Any:
        """Multiplies plain, small numbers only; `'-' * 10` within reason."""
        if operator == "**" and (abs(left) > 1e6 or abs(right) > 64):
            raise jinja2.exceptions.SecurityError("** of large numbers in a chat template")
        sizes = [len(value) for value in (left, right) if isinstance(value, Sequence)]
        counts = [value for value in (left, right) if isinstance(value, int)]
        if operator == "*" and sizes and counts and sizes[0] * counts[0] > MAX_RENDERED_CHARS:
            raise jinja2.exceptions.SecurityError("* makes too large a value in a chat template")
        return super().call_binop(context, operator, left, right)


class ChatTemplate:
    """A compiled chat template. Stateless; safe to use from several threads.

    `render` takes as much time and memory as the template likes; `TemplateProcess` bounds both.
    """

    def __init__(self, source: str, *, special_tokens: Mapping[str, str]) -> None:
        """`special_tokens` are variables such as bos_token and eos_token.

        The template is only parsed here: the compiler computes constant expressions of any size.
        Raises ConfigError if the source is not a template.
        """
        environment = _Sandbox(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, jinja2.ext.loopcontrols],
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            environment.parse(source)
        except jinja2.TemplateSyntaxError as error:
            raise ConfigError(f"chat template, line {error.lineno}: {error.message}") from error
        except RecursionError as error:
            raise ConfigError("chat template: it is nested too deeply") from error
        self._environment = environment
        self.source = source
        self.special_tokens = dict(special_tokens)

    @cached_property
    def _template(self) -> jinja2.Template:
        return self._environment.from_string(self.source)

    def compile(self) -> None:
        """Compiles the template now rather than in the first `render`."""
        _ = self._template

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Returns the prompt text. As in transformers, `variables` come before the model's own.

        Any failure of the template is a RequestError, but for the MemoryError of one that is larger
        than what the process may take.
        """
        pieces: list[str] = []
        size = 0
        try:
            for piece in self._template.generate(
                {
                    "tools": None,
                    "documents": None,
                    "add_generation_prompt": add_generation_prompt,
                    **self.special_tokens,
                    **(variables or {}),
                    "messages": [dict(message) for message in messages],
                }
            ):
                pieces.append(piece)
                size += len(piece)
                if size > MAX_RENDERED_CHARS:
                    raise _TemplateError(f"it renders to over {MAX_RENDERED_CHARS} characters")
        except MemoryError:
            raise
        except Exception as error:  # on unexpected messages a template may raise any
            raise RequestError(
                f"the model's chat template refused the messages: {str(error)[:_MAX_ERROR_CHARS]}",
                param="messages",
            ) from error
        return "".join(pieces)


def check_messages(
    value: Any, *, max_messages: int, ignored: list[str] | None = None
) -> list[dict[str, str]]:
    """Returns messages of role and text; text parts are joined by line ends, as in vLLM.

    What an assistant's answer has beside its text may come back with it: empty fields and those
    that say nothing to a template are dropped. Unknown fields are named in `ignored`, or refused
    without it. Raises RequestError naming the message and the field.
    """
    if not isinstance(value, list | tuple) or not value:
        raise RequestError("messages must be a list with at least one message", param="messages")
    check_num_messages(len(value), max_messages)
    return [_check_message(f"messages[{i}]", message, ignored) for i, message in enumerate(value)]


def check_num_messages(number: int, most: int) -> None:
    """Raises RequestError if there are more than `most`."""
    if number > most:
        raise RequestError(f"messages has {number} entries; at most {most}", param="messages")


def _check_message(where: str, message: Any, ignored: list[str] | None) -> dict[str, str]:
    if not isinstance(message, Mapping):
        raise RequestError(f"{where} must be an object", param=where)
    fields = {name: value for name, value in message.items() if value not in (None, "", [], {})}
    role = message.get("role")
    if not isinstance(role, str):
        raise RequestError(f"{where}.role must be a string", param=f"{where}.role")
    if role in ("tool", "function"):
        raise RequestError(
            f"{where}.role {role!r}: tools are not supported yet", param=f"{where}.role"
        )
    content = fields.get("content", message.get("content"))
    refusal = fields.pop("refusal", "")
    if role == "assistant" and content is None:  # it declined, or said nothing
        content = refusal
    for name in sorted(fields.keys() - _MESSAGE_FIELDS - _REPLAYED_FIELDS):
        _refuse_field(where, name, ignored)
    checked = {"role": role}
    for name in ("name", "reasoning_content"):
        if not isinstance(text := fields.get(name, ""), str):
            raise RequestError(f"{where}.{name} must be a string", param=f"{where}.{name}")
        if text:
            checked[name] = text
    return {**checked, "content": _content(f"{where}.content", content)}


def _refuse_field(where: str, name: str, ignored: list[str] | None) -> None:
    """Raises RequestError, unless the field is only unknown and those are ignored."""
    path = f"{where}.{name[:60]}"
    if name in _TOOL_FIELDS:
        raise RequestError(f"{path}: tools are not supported yet", param=path)
    if name == "audio" or ignored is None:
        raise RequestError(f"{path} is not supported", param=path)
    ignored.append(path)


def _content(where: str, content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list | tuple):
        raise RequestError(f"{where} must be a string or a list of text parts", param=where)
    texts: list[str] = []
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if not isinstance(kind, str) or kind not in _TEXT_PARTS:
            raise RequestError(f"{where}[{i}] must be of type text", param=f"{where}[{i}]")
        field = _TEXT_PARTS[kind]
        if not isinstance(part.get(field), str):
            param = f"{where}[{i}].{field}"
            raise RequestError(f"{param} must be a string", param=param)
        texts.append(part[field])
    return "\n".join(texts)


def _raise_exception(message: str) -> None:
    raise _TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)  # local time, as in Hugging Face


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
