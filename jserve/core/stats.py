"""Load and counters of an engine, declared once.

A field of `EngineStats` is sent to the gateway under its own name and shown at /metrics under the
name in its metadata. The scheduler counts them all but `num_compiles_after_warmup`, which the
engine's loop sets. A new one is a line here and one in engine.proto.
"""

import enum
from dataclasses import dataclass, field
from typing import Any


class StatKind(enum.Enum):
    GAUGE = "gauge"  # the present state
    COUNTER = "counter"  # only grows


def _gauge(metric: str, text: str, *, vllm: str | None = None) -> Any:
    return _stat(StatKind.GAUGE, metric, text, vllm)


def _counter(metric: str, text: str, *, vllm: str | None = None) -> Any:
    return _stat(StatKind.COUNTER, metric, text, vllm)


def _stat(kind: StatKind, metric: str, text: str, vllm: str | None) -> Any:
    return field(default=0, metadata={"kind": kind, "metric": metric, "help": text, "vllm": vllm})


@dataclass(slots=True, kw_only=True)
class EngineStats:
    """Load of an engine after a step. Counters grow for the life of the engine process.

    The scheduler owns the one that changes and hands out copies. Metadata of a field: `kind`;
    `metric`, its name at /metrics after `jserve_`; `help`; `vllm`, the name of vLLM's metric of
    the same meaning, after `vllm:`, or None.
    """

    num_waiting: int = _gauge(
        "num_requests_waiting", "Sequences that wait for a slot.", vllm="num_requests_waiting"
    )
    num_running: int = _gauge(
        "num_requests_running",
        "Sequences that hold a slot, or have left it with their last tokens in flight.",
        vllm="num_requests_running",
    )
    free_slots: int = _gauge("free_slots", "Slots without a sequence.")
    free_pages: int = _gauge("free_pages", "KV pages without a sequence.")
    cached_pages: int = _gauge(
        "cached_pages", "Free KV pages whose content is kept for prompts that begin alike."
    )
    num_preemptions: int = _counter(
        "num_preemptions", "Sequences that lost their pages.", vllm="num_preemptions"
    )
    num_steps: int = _counter("engine_steps", "Steps of the engine.")
    prompt_tokens: int = _counter(
        "engine_prompt_tokens", "Prompt tokens of sequences that were begun."
    )
    output_tokens: int = _counter("engine_output_tokens", "Tokens that sequences were given.")
    num_finished: int = _counter("sequences_finished", "Sequences that reached their end.")
    num_aborted: int = _counter("sequences_aborted", "Sequences that were aborted.")
    recomputed_tokens: int = _counter(
        "recomputed_tokens", "Tokens that were computed again after a preemption."
    )
    prefix_query_tokens: int = _counter(
        "prefix_query_tokens",
        "Prompt tokens that were looked up among computed ones.",
        vllm="prefix_cache_queries",
    )
    prefix_hit_tokens: int = _counter(
        "prefix_hit_tokens",
        "Prompt tokens that were found, and not computed.",
        vllm="prefix_cache_hits",
    )
    prefix_evicted_pages: int = _counter(
        "prefix_evicted_pages", "Kept KV pages that were given away."
    )
    num_compiles_after_warmup: int = _counter(
        "compiles_after_warmup", "Programs compiled while serving; should be 0."
    )
