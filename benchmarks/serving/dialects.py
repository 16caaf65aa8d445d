"""Differences of servers behind the same OpenAI routes: the fields and chunks that each knows.

A fixed length of the answer (`ignore_eos`) and neutral penalties are no part of OpenAI's API, so
each server is asked for them in its own words; the work is then the same for all.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.serving.failures import BenchmarkError

Json = dict[str, Any]


def _not_told(event: Json) -> int | None:
    return None


def _usage_so_far(event: Json) -> int | None:
    usage = event.get("usage")
    return usage.get("completion_tokens") if usage else None


def _timings_so_far(event: Json) -> int | None:
    timings = event.get("timings")
    return timings.get("predicted_n") if timings else None


@dataclass(frozen=True, slots=True)
class Dialect:
    """One kind of server."""

    takes_token_ids: bool = False  # prompts of the completions route
    fields: Mapping[str, Any] = field(default_factory=dict[str, Any])  # fields of every request
    stream_options: Mapping[str, Any] = field(default_factory=lambda: {"include_usage": True})
    tokens_so_far: Callable[[Json], int | None] = _not_told  # output tokens up to a chunk
    fixes_length: bool = False  # every answer has exactly max_tokens


DIALECTS: Mapping[str, Dialect] = {
    "jserve": Dialect(
        takes_token_ids=True,
        fields={"ignore_eos": True, "repetition_penalty": 1.0},
        fixes_length=True,
    ),
    "vllm": Dialect(
        takes_token_ids=True,
        fields={"ignore_eos": True, "repetition_penalty": 1.0},
        stream_options={"include_usage": True, "continuous_usage_stats": True},
        tokens_so_far=_usage_so_far,
        fixes_length=True,
    ),
    "llama.cpp": Dialect(
        takes_token_ids=True,
        # Nothing is to be taken from an earlier request: prompts are computed, as elsewhere.
        fields={
            "ignore_eos": True,
            "repeat_penalty": 1.0,
            "cache_prompt": False,
            "timings_per_token": True,
        },
        tokens_so_far=_timings_so_far,
        fixes_length=True,
    ),
    "openai": Dialect(),
}
_OWNERS = {"jserve": "jserve", "vllm": "vllm", "llamacpp": "llama.cpp"}


def dialect_of(owned_by: object) -> str:
    """The dialect of a server, by what /v1/models says of its model."""
    return _OWNERS.get(owned_by, "openai") if isinstance(owned_by, str) else "openai"


def dialect(name: str) -> Dialect:
    """Raises BenchmarkError for a name that is not there."""
    if name not in DIALECTS:
        raise BenchmarkError(f"--dialect {name!r}: one of auto, {', '.join(DIALECTS)}")
    return DIALECTS[name]
