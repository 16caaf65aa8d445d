"""All ways of writing reasoning: by name, and by what a model's chat template says."""

from jserve.core.errors import ConfigError
from jserve.gateway.reasoning.format import ReasoningFormat
from jserve.gateway.reasoning.harmony import Harmony
from jserve.gateway.reasoning.tagged import GEMMA_4, MISTRAL, THINK

_ALL: tuple[ReasoningFormat, ...] = (THINK, MISTRAL, GEMMA_4, Harmony())
FORMATS = {one.name: one for one in _ALL}
# Names that vLLM and SGLang give to the same formats.
_ALIASES = {
    "deepseek-r1": "think",
    "deepseek_r1": "think",
    "deepseek_v3": "think",
    "gpt-oss": "openai_gptoss",
    "harmony": "openai_gptoss",
    "magistral": "mistral",
    "qwen3": "think",
    "qwen3-thinking": "think",
    "smollm3": "think",
}

# The first whose texts are all in the template is the model's.
_SIGNS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("<|channel|>", "analysis"), "openai_gptoss"),
    (("<|channel>",), "gemma4"),
    (("[THINK]",), "mistral"),
    (("<think>",), "think"),
    (("</think>",), "think"),
)


def named_format(name: str) -> ReasoningFormat:
    """Returns the format of this name or alias. Raises ConfigError listing the names."""
    found = FORMATS.get(_ALIASES.get(name, name))
    if found is None:
        raise ConfigError(
            f"there is no reasoning parser {name!r}; there are {', '.join(sorted(FORMATS))}, "
            f"and by other names {', '.join(sorted(_ALIASES))}"
        )
    return found


def detect_format(chat_template: str | None) -> ReasoningFormat | None:
    """Returns the format that the template writes or strips; None if it knows no reasoning."""
    for signs, name in _SIGNS:
        if chat_template is not None and all(sign in chat_template for sign in signs):
            return FORMATS[name]
    return None
