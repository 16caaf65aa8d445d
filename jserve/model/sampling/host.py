"""NumPy records of a request's sampling, as the engine packs them at admission."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from jserve.core.request import MAX_STOP_TOKEN_IDS, SamplingParams
from jserve.model.sampling.state import SLOT_ROW, Processor, processor_row_dtype


class HostRow(NamedTuple):
    """One sequence's sampling, as the device keeps it."""

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
    """Packs the sampling of one request: fields of `SLOT_ROW` by their name in `SamplingParams`.

    Args:
      sampling: of a checked request: ids are in the vocabulary, no more of them than
        `core.request` has room for, and the masks leave some token.
      choice: `Request.choice`.
      eos_token_ids: of the model; they end the sequence unless `ignore_eos`.
      prompt_len: tokens.
      vocab: number of token ids.
    """
    bits = _processors(sampling)
    stop, only_masked = _stop_ids(sampling, eos_token_ids)
    stop_ids = np.full(MAX_STOP_TOKEN_IDS, -1, np.int32)
    stop_ids[: len(stop) + len(only_masked)] = stop + only_masked
    seed = sampling.seed % 2**64  # two's complement, as jax.random.key
    converted = {
        "top_k": min(max(sampling.top_k, 0), vocab),
        "seed": (seed >> 32, seed % 2**32),
        "choice": choice,
        "num_logprobs": -1 if sampling.logprobs is None else sampling.logprobs,
        "processors": bits,
        "num_stop_ids": len(stop),
        "min_total": prompt_len + sampling.min_tokens,
        "max_total": prompt_len + sampling.max_tokens,
        "stop_ids": stop_ids,
    }
    row = np.zeros((), SLOT_ROW)
    for name in SLOT_ROW.names or ():
        row[name] = converted[name] if name in converted else getattr(sampling, name)
    if not bits & (Processor.MASK | Processor.BIAS):
        return HostRow(row, None)
    rules = sampling.logit_bias, sampling.allowed_token_ids, sampling.bad_token_ids
    return HostRow(row, _processor_row(*rules, vocab))


def _stop_ids(
    sampling: SamplingParams, eos_token_ids: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids that end the sequence, and ids that are only masked while the sequence is too short."""
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


@lru_cache(maxsize=4)  # the choices of a request come one after another
def _processor_row(
    bias: tuple[tuple[int, float], ...],
    allowed_ids: tuple[int, ...],
    bad_ids: tuple[int, ...],
    vocab: int,
) -> np.ndarray:
    row = np.zeros((), processor_row_dtype(vocab))
    row["bias_ids"] = -1
    row["bias_ids"][: len(bias)] = [token for token, _ in bias]
    row["bias"][: len(bias)] = [value for _, value in bias]

    allowed = np.zeros(row["mask"].size * 32, bool)
    if allowed_ids:
        allowed[list(allowed_ids)] = True
    else:
        allowed[:vocab] = True
    allowed[list(bad_ids)] = False
    row["mask"] = np.packbits(allowed, bitorder="little").view("<u4")
    row.flags.writeable = False  # others get it too
    return row
