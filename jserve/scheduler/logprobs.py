"""Log-probabilities from the arrays of a step to the records of a request."""

from jserve.core.request import TokenLogprobs
from jserve.core.step import RowLogprobs


def of_tokens(
    rows: RowLogprobs, row: int, tokens: list[int], num_top: int
) -> tuple[TokenLogprobs, ...]:
    """Records of the `tokens` that row `row` got, with `num_top` alternatives each."""
    return tuple(_record(rows, row, step, token, num_top) for step, token in enumerate(tokens))


def of_prompt(
    rows: RowLogprobs, first: int, tokens: tuple[int, ...], num_top: int
) -> list[TokenLogprobs | None]:
    """Records of the prompt `tokens`, predicted at the ragged tokens from `first` on."""
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
