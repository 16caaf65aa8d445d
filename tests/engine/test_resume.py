"""A second engine continues what a first one began: the same tokens and log-probabilities."""

from dataclasses import replace

import pytest

from jserve.core.request import Request, SamplingParams
from tests.engine.engine_harness import CONFIG, TINY, Harness


@pytest.fixture(scope="module")
def engine(programs_folder) -> Harness:
    return Harness(TINY, CONFIG, cache_folder=programs_folder)


PENALTIES = {"presence_penalty": 0.7, "frequency_penalty": 0.4, "repetition_penalty": 1.3}
KINDS = {
    "greedy": {"temperature": 0.0},
    "top_p": {"seed": 11, "top_p": 0.9},
    "top_k": {"seed": -5, "top_k": 20, "temperature": 1.5},
    "penalties": {"seed": 3, **PENALTIES},
    "greedy_penalties": {"temperature": 0.0, **PENALTIES},
    "biases": {"seed": 4, "logit_bias": ((7, 2.0), (9, -3.0)), "bad_token_ids": (5, 6)},
    "min_tokens": {"seed": 9, "min_tokens": 20, "stop_token_ids": tuple(range(20, 40))},
}


def test_every_kind_of_sampling_is_continued_exactly(engine: Harness) -> None:
    requests = [
        Request(
            id=f"{kind}/{choice}",
            prompt=tuple((7 * index + 3 * i) % TINY.vocab for i in range(5 + 9 * index)),
            sampling=SamplingParams(max_tokens=24, ignore_eos=True, logprobs=3, **fields),
            choice=choice,
        )
        for index, (kind, fields) in enumerate(KINDS.items())
        for choice in range(2)
    ]
    undisturbed = engine.run(requests)
    resumed: list[Request] = []
    cuts = {}
    for index, request in enumerate(requests):
        whole = undisturbed[request.id].tokens
        cuts[request.id] = (5 * index) % min(len(whole), 22)
        output = tuple(whole[: cuts[request.id]])
        resumed.append(replace(request, output=output, resumed=True))
    # Among other neighbours, in other slots.
    continued = engine.run(resumed[::-1], [3 * i for i in range(len(resumed))])
    for request in requests:
        whole, rest, cut = undisturbed[request.id], continued[request.id], cuts[request.id]
        assert rest.tokens == whole.tokens[cut:], request.id
        assert rest.finish is whole.finish
        for one, other in zip(rest.logprobs, whole.logprobs[cut:], strict=True):
            assert one.token_id == other.token_id
            assert one.logprob == pytest.approx(other.logprob, abs=1e-5)
            assert [token for token, _ in one.top] == [token for token, _ in other.top]
    assert len(set(cuts.values())) > 10
