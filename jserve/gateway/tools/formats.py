"""All call formats: by name, and by what a model's chat template says."""

import re

from jserve.core.errors import ConfigError
from jserve.gateway.tools.format import ToolFormat
from jserve.gateway.tools.gemma import FUNCTION_GEMMA, GEMMA_4
from jserve.gateway.tools.gemma3 import Gemma3
from jserve.gateway.tools.generic_json import GenericJson
from jserve.gateway.tools.harmony import Harmony
from jserve.gateway.tools.hermes import Hermes
from jserve.gateway.tools.llama3_json import Llama3Json
from jserve.gateway.tools.mistral import Mistral
from jserve.gateway.tools.pythonic import Pythonic
from jserve.gateway.tools.qwen3_coder import Qwen3Coder

_ALL: tuple[ToolFormat, ...] = (
    Hermes(),
    Llama3Json(),
    Pythonic(),
    Mistral(),
    Qwen3Coder(),
    Gemma3(),
    FUNCTION_GEMMA,
    GEMMA_4,
    Harmony(),
    GenericJson(),
)
FORMATS = {one.name: one for one in _ALL}
# Names that vLLM and SGLang give to the same formats.
_ALIASES = {
    "gemma": "gemma3",
    "gpt-oss": "harmony",
    "json": "generic_json",
    "llama3": "llama3_json",
    "llama4_json": "llama3_json",
    "llama4_pythonic": "pythonic",
    "openai": "harmony",
    "qwen": "hermes",
    "qwen25": "hermes",
    "qwen3_xml": "qwen3_coder",
    "smollm": "hermes",
    "xlam": "generic_json",
}

# The first whose texts are all in the template is the model's. None: a format not known here,
# which shares a text with one that is.
_SIGNS: tuple[tuple[tuple[str, ...], str | None], ...] = (
    (("<arg_key>",), None),  # GLM
    (("<function=", "<parameter="), "qwen3_coder"),
    (("<|channel|>", "to=functions."), "harmony"),
    (("<|tool_call>", "call:"), "gemma4"),
    (("<start_function_call>",), "functiongemma"),
    (("[TOOL_CALLS]",), "mistral"),
    (("<tool_call>",), "hermes"),
    (("tool_code",), "gemma3"),
    (("[func_name1(",), "pythonic"),
    (('"parameters":',), "llama3_json"),
    (("<|python_tag|>",), "llama3_json"),
    (("<|python_start|>",), "pythonic"),
)
# A use of the variable, within a tag; SmolLM3 has another name for it.
_TAGS = re.compile(r"(\{[%{]|[%}]\})")
_TOOLS = re.compile(r"\b(?:xml_)?tools\b")
# A marker of calls that no format here has.
_FOREIGN = re.compile(r"<[^<>\s]*(?:tool|function).?calls?[^<>\s]*>", re.IGNORECASE)


def takes_tools(chat_template: str | None) -> bool:
    """Whether the template writes the tools that it is given.

    Clients send templates, so the time is linear in its length.
    """
    inside = False
    for piece in () if chat_template is None else _TAGS.split(chat_template):
        if _TAGS.fullmatch(piece):
            inside = piece[0] == "{"
        elif inside and _TOOLS.search(piece):
            return True
    return False


def named_format(name: str) -> ToolFormat:
    """Returns the format of this name or alias. Raises ConfigError listing the names."""
    found = FORMATS.get(_ALIASES.get(name, name))
    if found is None:
        raise ConfigError(
            f"there is no tool parser {name!r}; there are {', '.join(sorted(FORMATS))}, "
            f"and by other names {', '.join(sorted(_ALIASES))}"
        )
    return found


def detect_format(chat_template: str | None) -> ToolFormat | None:
    """Returns the format that the template asks for; None if it takes no tools or a foreign one."""
    if chat_template is None or not takes_tools(chat_template):
        return None
    for signs, name in _SIGNS:
        if all(sign in chat_template for sign in signs):
            return None if name is None else FORMATS[name]
    return None if _FOREIGN.search(chat_template) else FORMATS["generic_json"]
