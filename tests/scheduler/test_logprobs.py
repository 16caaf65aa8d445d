"""Records of a step's arrays: packed ones of a prompt are those of single tokens."""

import numpy as np
import pytest

from jserve.core.step import RowLogprobs
from jserve.scheduler.logprobs import prompt_records, token_records


@pytest.mark.parametrize("num_top", [0, 1, 20])
@pytest.mark.parametrize("num_tokens", [0, 1, 7])
def test_prompt_records_are_those_of_each_token(num_tokens: int, num_top: int) -> None:
    random = np.random.default_rng(0)
    rows = RowLogprobs(
        token=-random.random((12, 1), dtype=np.float32),
        rank=random.integers(1, 99, (12, 1), dtype=np.int32),
        top_ids=random.integers(0, 2**31 - 1, (12, 1, 20), dtype=np.int32),
        top=-random.random((12, 1, 20), dtype=np.float32),
    )
    tokens = tuple(range(100, 100 + num_tokens))
    expected = [token_records(rows, 3 + i, [token], num_top)[0] for i, token in enumerate(tokens)]
    assert list(prompt_records(rows, 3, tokens, num_top)) == expected
