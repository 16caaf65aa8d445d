"""The engine as a whole on a tiny model: what it generates, and what must not change it."""

import numpy as np
import pytest
from jserve.core.request import FinishReason, Request, SamplingParams

from .engine_harness import Harness


@pytest.fixture(scope="module")
def harness() -> Harness:
    return Harness()


def _prompt(seed: int, length: int) -> tuple[int, ...]:
    return tuple(int(t) for t in np.random.default_rng(seed).integers(2, 96, length))


def _requests(num: int, **sampling) -> list[Request]:
    rng = np.random.default_rng(7)
    return [
        Request(
            id=f"r{i}",
            prompt=_prompt(i, int(rng.integers(1, 60))),
            sampling=SamplingParams(
                max_tokens=int(rng.integers(1, 30)), seed=i, ignore_eos=True, **sampling
            ),
        )
        for i in range(num)
    ]


def test_greedy_text_is_that_of_a_dense_forward(harness: Harness) -> None:
    requests = _requests(9, temperature=0.0)
    outcomes = harness.run(requests, arrivals=[0, 0, 1, 2, 2, 2, 9, 9, 20])
    for request in requests:
        expected = harness.greedy(request.prompt, request.sampling.max_tokens)
        assert outcomes[request.id].tokens == expected
        assert outcomes[request.id].finish is FinishReason.LENGTH
