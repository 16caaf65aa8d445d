"""NumPy records of a request's sampling, as the engine packs them at admission."""

from typing import NamedTuple

import numpy as np

from jserve.core.request import SamplingParams
from jserve.model.sampling.state import SLOT_ROW, Processor, processor_row_dtype


class HostRow(NamedTuple):
    """What the device must know of one sequence's sampling."""

    slot: np.ndarray  # SLOT_ROW, shape (); view(np.int32) for words
    processors: np.ndarray | None  # processor_row_dtype(vocab), shape (); None if not needed


def host_row(
    sampling: SamplingParams,
    *,
    choice: int,
    eos_token_ids: tuple[int, ...],
    prompt_len: int,
    vocab: int,
) -> HostRow:
    """Packs the sampling of one request.

    Args:
      sampling: what was asked for, checked by whoever took the request: ids in the vocabulary,
        no more of them than `core.request` has room for, some token left by the masks.
      choice: `Request.choice`.
      eos_token_ids: of the model; they end the sequence unless `ignore_eos`.
      prompt_len: tokens.
      vocab: number of token ids.
    """
    stop, only_masked = _stop_ids(sampling, eos_token_ids)
    bits = _processors(sampling)
    row = np.zeros((), SLOT_ROW)
    row["temperature"] = sampling.temperature
    row["top_p"] = sampling.top_p
    row["min_p"] = sampling.min_p
    row["repetition_penalty"] = sampling.repetition_penalty
    row["presence_penalty"] = sampling.presence_penalty
    row["frequency_penalty"] = sampling.frequency_penalty
    row["top_k"] = min(max(sampling.top_k, 0), vocab)
    seed = sampling.seed % 2**64  # two's complement, as jax.random.key
    row["seed"] = (seed >> 32, seed % 2**32)
    row["choice"] = choice
    row["num_logprobs"] = -1 if sampling.logprobs is None else sampling.logprobs
    row["processors"] = bits
    row["num_stop_ids"] = len(stop)
    row["min_total"] = prompt_len + sampling.min_tokens
    row["max_total"] = prompt_len + sampling.max_tokens
    row["stop_ids"] = -1
    row["stop_ids"][: len(stop) + len(only_masked)] = stop + only_masked
    if not bits & (Processor.MASK | Processor.BIAS):
        return HostRow(row, None)
    return HostRow(row, _processor_row(sampling, vocab))


def _stop_ids(
    sampling: SamplingParams, eos_token_ids: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids that end the sequence, and ids that are only masked while it is too short."""
    asked = tuple(dict.fromkeys(sampling.stop_token_ids))
    eos = tuple(token for token in dict.fromkeys(eos_token_ids) if token not in asked)
    return (asked, eos) if sampling.ignore_eos else (asked + eos, ())


def _processors(sampling: SamplingParams) -> Processor:
    bits = Processor(0)
    if sampling.allowed_token_ids or sampling.bad_token_ids:
        bits |= Processor.MASK
    if sampling.logit_bias:
        bits |= Processor.BIAS
    if sampling.min_tokens > 0:
        bits |= Processor.MIN_TOKENS
    if sampling.has_penalties:
        bits |= Processor.PENALTIES
    return bits


def _processor_row(sampling: SamplingParams, vocab: int) -> np.ndarray:
    row = np.zeros((), processor_row_dtype(vocab))
    bias = sampling.logit_bias
    row["bias_ids"] = -1
    row["bias_ids"][: len(bias)] = [token for token, _ in bias]
    row["bias"][: len(bias)] = [value for _, value in bias]

    allowed = np.zeros(row["mask"].size * 32, bool)
    if sampling.allowed_token_ids:
        allowed[list(sampling.allowed_token_ids)] = True
    else:
        allowed[:vocab] = True
    allowed[list(sampling.bad_token_ids)] = False
    row["mask"] = np.packbits(allowed, bitorder="little").view("<u4")
    return row
