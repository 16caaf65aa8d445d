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
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Any] | None = None,
        source: str | None = None,
    ) -> str:
        """Returns the prompt text. As in transformers, `variables` come before the model's own.

        `source` is a template instead of the model's.

        Any failure of the template is a RequestError, but for the MemoryError of one that is larger
        than what the process may take.
        """
        pieces: list[str] = []
        size = 0
        try:
            template = self._template
            if source is not None:
                template = self._environment.from_string(source)
            for piece in template.generate(
                {
                    "tools": tools or None,
                    "documents": documents or None,
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
            text = str(error)[:_MAX_ERROR_CHARS]
            if source is not None:
                raise RequestError(f"chat_template: {text}", param="chat_template") from error
            message = f"the model's chat template refused the messages: {text}"
            raise RequestError(message, param="messages") from error
        return "".join(pieces)


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
