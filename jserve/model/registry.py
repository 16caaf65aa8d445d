"""The one list of decoder families. A new family is one file and one line here."""

from jserve.model.decoder import Family
from jserve.model.gemma3 import GEMMA3
from jserve.model.llama import LLAMA
from jserve.model.mixtral import MIXTRAL
from jserve.model.qwen3 import QWEN3, QWEN3_MOE

FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": LLAMA,
    "qwen3": QWEN3,
    "gemma3": GEMMA3,
    "mixtral": MIXTRAL,
    "qwen3_moe": QWEN3_MOE,
}
