"""The vocabulary of tool calls, and what every call format offers: a parser and a grammar."""

import secrets
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol, TypeAlias

from jserve.core.errors import RequestError

Schema: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call; `parameters` is the JSON schema of its arguments."""

    name: str
    description: str = ""
    parameters: Schema = field(default_factory=dict[str, Any])
    strict: bool = False

    def properties(self) -> Mapping[str, Schema]:
        """Schemas of the arguments by name, without those that are not objects."""
        named = self.parameters.get("properties")
        if not isinstance(named, Mapping):
            return {}
        return {key: value for key, value in named.items() if isinstance(value, Mapping)}


class ChoiceMode(Enum):
    """Whether the answer has to be calls."""

    NONE = "none"
    AUTO = "auto"
    REQUIRED = "required"
    NAMED = "named"


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """What the client wants called; `name` is set for NAMED alone."""

    mode: ChoiceMode
    name: str | None = None


AUTO = ToolChoice(ChoiceMode.AUTO)


@dataclass(frozen=True, slots=True)
class TextPart:
    """The next piece of the answer's text."""

    text: str


@dataclass(frozen=True, slots=True)
class CallPart:
    """The next piece of call number `index`.

    `name` is set in the call's first part. The `arguments` of all parts of a call, joined, are one
    JSON document, unless the text was cut off or stopped being a call in the middle of it.
    """

    index: int
    name: str | None
    arguments: str


Part: TypeAlias = TextPart | CallPart


class ToolParser(Protocol):
    """Splits one choice's text, as it grows, into text and calls. One per choice.

    The joined parts don't depend on how the text was cut. Text is withheld while it may belong to a
    call: the beginning of a marker, white space before one, and a call up to its name. A call is
    given out once its name is known to be a tool's and its arguments begin. What turns out to be
    none before that comes out as text, unchanged; what is malformed after that ends the call, and
    the rest of it is text. White space between a call and its neighbours belongs to the format.
    """

    def feed(self, text: str) -> list[Part]: ...

    def finish(self) -> list[Part]:
        """Ends the text and returns what was withheld."""
        ...


ArgumentSchema: TypeAlias = Callable[[Tool], Schema]


def own_schema(tool: Tool) -> Schema:
    """The schema that a tool's arguments have if nothing else is asked for."""
    return {"type": "object", **tool.parameters}


@dataclass(frozen=True, slots=True, kw_only=True)
class WantedCalls:
    """What a grammar has to force.

    REQUIRED forces one call, or several if `parallel`; NAMED forces one call of that tool. AUTO
    lets text go until a call begins, and binds the arguments of strict tools alone. `special` maps
    the texts of the vocabulary's special tokens to their ids.
    """

    tools: Sequence[Tool]
    choice: ToolChoice
    parallel: bool = True
    special: Mapping[str, int] = field(default_factory=dict[str, int])
    argument_schema: ArgumentSchema = own_schema

    @property
    def free(self) -> bool:
        """Whether any text will do."""
        if self.choice.mode is ChoiceMode.AUTO:
            return not any(tool.strict for tool in self.tools)
        return self.choice.mode is ChoiceMode.NONE

    def bound(self) -> list[tuple[Tool, Schema]]:
        """Returns the tools that may be called, with the schemas of their arguments.

        Raises RequestError if there is none.
        """
        loose = self.choice.mode is ChoiceMode.AUTO
        named = self.choice.name if self.choice.mode is ChoiceMode.NAMED else None
        tools = [tool for tool in self.tools if named is None or tool.name == named]
        if not tools:
            what = "a call" if named is None else repr(named)
            raise RequestError(
                f"tool_choice asks for {what}, which is not among the tools", param="tool_choice"
            )
        return [
            (tool, {"type": "object"} if loose and not tool.strict else self.argument_schema(tool))
            for tool in tools
        ]

    @property
    def several(self) -> bool:
        return self.parallel and self.choice.mode is not ChoiceMode.NAMED


class ToolFormat(Protocol):
    """How one family of models writes calls."""

    @property
    def name(self) -> str: ...

    @property
    def markers(self) -> tuple[str, ...]:
        """Texts that the parser must see even where they are special tokens, which are skipped."""
        ...

    def parser(self, tools: Sequence[Tool]) -> ToolParser: ...

    def grammar(self, wanted: WantedCalls) -> str | None:
        """Returns llguidance's Lark text for the whole answer, or None if any text will do.

        Raises RequestError, naming the keyword, if the format cannot bind a tool's schema.
        """
        ...

    def call_id(self) -> str:
        """Returns a new id for a call, of the form that the model's template takes back."""
        ...


_ALPHANUMERIC = string.ascii_letters + string.digits


def random_id(length: int) -> str:
    """Returns random letters and digits."""
    return "".join(secrets.choice(_ALPHANUMERIC) for _ in range(length))


def openai_call_id() -> str:
    """Returns a new id as OpenAI's API has them."""
    return f"call_{random_id(24)}"
