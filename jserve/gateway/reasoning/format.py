"""The vocabulary of reasoning, and what every way of writing it offers."""

from dataclasses import dataclass
from typing import Protocol, TypeAlias

from jserve.gateway.tools.format import TextPart


@dataclass(frozen=True, slots=True)
class ReasoningPart:
    """The next piece of the model's reasoning."""

    text: str


Part: TypeAlias = ReasoningPart | TextPart


class ReasoningParser(Protocol):
    """Splits one choice's text, as it grows, into reasoning and text. One per choice.

    The joined parts don't depend on how the text was cut. Markers, and white space between them and
    what they enclose, belong to the format. Calls of tools are text.
    """

    def feed(self, text: str) -> list[Part]: ...

    def finish(self) -> list[Part]:
        """Ends the text and returns what was withheld."""
        ...


class ReasoningFormat(Protocol):
    """How one family of models writes reasoning."""

    @property
    def name(self) -> str: ...

    @property
    def start(self) -> str:
        """The text that opens reasoning."""
        ...

    @property
    def end(self) -> str:
        """The text that ends it, which can be forced once a budget is used up."""
        ...

    @property
    def markers(self) -> tuple[str, ...]:
        """Texts that the parser must see even where they are special tokens, which are skipped."""
        ...

    def parser(self, *, starts_inside: bool = False) -> ReasoningParser:
        """`starts_inside` says that the prompt opened the reasoning."""
        ...

    def starts_inside(self, prompt: str, *, continued: str = "") -> bool:
        """Whether the answer to a rendered prompt begins within reasoning.

        `continued` is the assistant's message that the prompt ends with and the answer goes on
        with, if any. Other messages may hold markers that mean nothing.
        """
        ...
