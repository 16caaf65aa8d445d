"""How the served model writes calls of tools and reasoning: from its chat template, or by name."""

from dataclasses import dataclass

from jserve.gateway.config import GatewayConfig
from jserve.gateway.reasoning import formats as reasoning_formats
from jserve.gateway.reasoning.format import ReasoningFormat
from jserve.gateway.tools import formats as tool_formats
from jserve.gateway.tools.format import ToolFormat

NO_PARSER = "none"  # as the name of a parser: calls, or reasoning, are text


@dataclass(frozen=True, slots=True)
class ChatFormats:
    """Formats of a model. None: it has no tools, or no reasoning."""

    tools: ToolFormat | None = None
    reasoning: ReasoningFormat | None = None
    renders_tools: bool = False  # the template does; else tools are described in a system message

    @classmethod
    def of_template(cls, template: str | None, config: GatewayConfig) -> "ChatFormats":
        """Reads them off the template, unless the config names them.

        Raises ConfigError for the name of a parser that there is not.
        """
        detected = tool_formats.detect_format(template)
        tools, reasoning = detected, reasoning_formats.detect_format(template)
        if config.tool_parser is not None:
            name = config.tool_parser
            tools = None if name == NO_PARSER else tool_formats.named_format(name)
        if config.reasoning_parser is not None:
            name = config.reasoning_parser
            reasoning = None if name == NO_PARSER else reasoning_formats.named_format(name)
        return cls(tools, reasoning, renders_tools=tool_formats.takes_tools(template))

    @property
    def bounds_reasoning(self) -> bool:
        """Whether reasoning has an end that a budget can force."""
        return self.reasoning is not None and bool(self.reasoning.end)

    @property
    def markers(self) -> tuple[str, ...]:
        """Texts that parsers must see though they may be special tokens."""
        found: list[str] = []
        for one in (self.tools, self.reasoning):
            found += () if one is None else one.markers
        return tuple(found)
