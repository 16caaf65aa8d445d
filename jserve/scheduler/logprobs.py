"""Makes the log-probability records of a request from the arrays of a step."""

import numpy as np

from jserve.core.logprobs import LogprobBytes, PackedLogprobs
from jserve.core.request import TokenLogprobs
from jserve.core.step import RowLogprobs


def token_records(
    rows: RowLogprobs, row: int, tokens: list[int], num_top: int
) -> tuple[TokenLogprobs, ...]:
    """Makes records of the `tokens` sampled in row `row`, with `num_top` alternatives each."""
    return tuple(_record(rows, row, step, token, num_top) for step, token in enumerate(tokens))


def prompt_records(
    rows: RowLogprobs, first: int, tokens: tuple[int, ...], num_top: int
) -> PackedLogprobs[TokenLogprobs]:
    """Packs the records of prompt `tokens`, which the ragged tokens from `first` on predict.

    An object for each of a chunk's records would hold up the step loop for 16 ms.
    """
    chunk = slice(first, first + len(tokens))
    ids = np.column_stack((np.asarray(tokens, np.int32), rows.top_ids[chunk, 0, :num_top]))
    values = np.column_stack((rows.token[chunk, 0], rows.top[chunk, 0, :num_top]))
    ends = np.arange(1, len(tokens) + 1) * (1 + num_top)
    return PackedLogprobs[TokenLogprobs].from_bytes(
        LogprobBytes(
            ids.astype("<i4").tobytes(),
            values.astype("<f4").tobytes(),
            rows.rank[chunk, 0].astype("<i4").tobytes(),
            ends.astype("<i8").tobytes(),
        )
    )


def _record(rows: RowLogprobs, row: int, step: int, token: int, num_top: int) -> TokenLogprobs:
    ids: list[int] = rows.top_ids[row, step, :num_top].tolist()
    values: list[float] = rows.top[row, step, :num_top].tolist()
    return TokenLogprobs(
        token_id=token,
        logprob=float(rows.token[row, step]),
        rank=int(rows.rank[row, step]),
        top=tuple(zip(ids, values, strict=True)),
    )
