"""The settings of the KV cache. Plain data."""

import enum
from dataclasses import dataclass

from jserve.core.field_types import check_types


class ReuseGenerated(enum.Enum):
    """Whether pages that decode steps have written are shared, as those of prompts are.

    Numbers of a decode step may differ in the last bits from those of a prompt of the same tokens,
    so the answer that continues them may, too. On CPUs with the native kernels they are equal.
    """

    AUTO = "auto"  # where they are equal, or the model is not exact (float32) anyway
    ALWAYS = "always"
    NEVER = "never"


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """Settings of what is kept of answered requests; its size is `engine.num_pages`."""

    prefix: bool = True  # share the pages of prompts that begin alike
    reuse_generated: ReuseGenerated = ReuseGenerated.AUTO
    # Compare the tokens of pages whose names are equal, and fail if they differ: for debugging.
    compare_tokens: bool = False

    def __post_init__(self) -> None:
        check_types(self, "cache.")
