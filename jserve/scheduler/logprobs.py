"""Makes the log-probability records of a request from the arrays of a step."""

from jserve.core.request import TokenLogprobs
from jserve.core.step import RowLogprobs


def token_records(
    rows: RowLogprobs, row: int, tokens: list[int], num_top: int
) -> tuple[TokenLogprobs, ...]:
    """Makes records of the `tokens` sampled in row `row`, with `num_top` alternatives each."""
    return tuple(_record(rows, row, step, token, num_top) for step, token in enumerate(tokens))


def prompt_records(
    rows: RowLogprobs, first: int, tokens: tuple[int, ...], num_top: int
) -> list[TokenLogprobs | None]:
    """Makes records of prompt `tokens`, which the ragged tokens from `first` on predict."""
    return [_record(rows, first + i, 0, token, num_top) for i, token in enumerate(tokens)]


def _record(rows: RowLogprobs, row: int, step: int, token: int, num_top: int) -> TokenLogprobs:
    ids: list[int] = rows.top_ids[row, step, :num_top].tolist()
    values: list[float] = rows.top[row, step, :num_top].tolist()
    return TokenLogprobs(
        token_id=token,
        logprob=float(rows.token[row, step]),
        rank=int(rows.rank[row, step]),
        top=tuple(zip(ids, values, strict=True)),
    )
