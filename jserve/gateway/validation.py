"""Ranges, limits and messages of every request field: one place for HTTP, gRPC and offline."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingFields:
    """Sampling fields as a client gave them; None means not given.

    Values may be of any type: `resolve` checks them and names the field that is wrong.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Mapping[int | str, float] | None = None  # keys: ids, or ids as text (JSON)
    allowed_token_ids: Sequence[int] | None = None
    bad_token_ids: Sequence[int] | None = None
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Sequence[int] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
