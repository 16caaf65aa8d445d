"""An engine's border: what could not be packed or run is refused, and nothing else is."""

from dataclasses import replace

import pytest

from jserve.core.errors import PromptTooLong, RequestError
from jserve.core.request import Request, SamplingParams
from jserve.core.request_check import check_request
from tests.gateway.fixtures import INFO

GOOD = Request(id="a", prompt=(7, 8))
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", (NAN, INF, -1.0, 101.0)),
        ("top_k", (-2,)),
        ("top_p", (0.0, NAN, 1.5)),
        ("min_p", (-0.5, NAN, 2.0)),
        ("repetition_penalty", (0.0, -1.0, NAN, INF)),
        ("presence_penalty", (NAN, -3.0, INF)),
        ("frequency_penalty", (NAN, 3.0, -INF)),
        ("logprobs", (-1, 21, 1000)),
        ("prompt_logprobs", (-1, 21)),
        ("max_tokens", (0, -1, 2**31)),
        ("min_tokens", (-1, 17, 2**31 - 1)),
        ("stop_token_ids", ((410,), (-1,), (10**9,), tuple(range(3, 34)))),
        ("allowed_token_ids", ((410,), (-1,), (1, 10**9))),
        ("bad_token_ids", ((410,), (-5,), tuple(range(410)), (5,) * 411)),
        (
            "logit_bias",
            (
                tuple((token, 1.0) for token in range(301)),
                ((410, 1.0),),
                ((-1, 1.0),),
                ((5, NAN),),
                ((5, INF),),
                ((5, 101.0),),
                ((5, 1.0), (5, 2.0)),
            ),
        ),
    ],
)
def test_a_bad_value_is_refused_by_name(name: str, values: tuple[object, ...]) -> None:
    for value in values:
        sampling = replace(SamplingParams(), **{name: value})
        with pytest.raises(RequestError) as refused:
            check_request(replace(GOOD, sampling=sampling), INFO)
        assert refused.value.param == name, value
        assert len(str(refused.value)) < 200


def test_masks_that_leave_nothing() -> None:
    for sampling in (
        SamplingParams(allowed_token_ids=(5,), bad_token_ids=(5,)),
        SamplingParams(allowed_token_ids=(1, 2), min_tokens=1),
        # Ignored end-of-sequence ids are masked until min_tokens, too.
        SamplingParams(allowed_token_ids=(1,), min_tokens=1, ignore_eos=True),
        SamplingParams(allowed_token_ids=(5,), stop_token_ids=(5,), min_tokens=3),
    ):
        with pytest.raises(RequestError, match="no token"):
            check_request(replace(GOOD, sampling=sampling), INFO)


@pytest.mark.parametrize(
    ("bad", "param"),
    [
        ({"id": ""}, "id"),
        ({"id": "x" * 257}, "id"),
        ({"prompt": ()}, "prompt"),
        ({"prompt": (7, 410)}, "prompt"),
        ({"prompt": (10**9,)}, "prompt"),
        ({"prompt": (-1,)}, "prompt"),
        ({"choice": -1}, "choice"),
        ({"priority": 2**31}, "priority"),
        ({"tenant": "x" * 257}, "tenant"),
        ({"tenant_slots": -1}, "tenant_slots"),
        ({"tenant_slots": 2**31}, "tenant_slots"),
        ({"output": (410,)}, "output"),
        ({"output": (5,) * 16}, "output"),
        ({"deadline_s": NAN}, "deadline_s"),
        ({"deadline_s": -1.0}, "deadline_s"),
    ],
)
def test_a_bad_request_is_refused_by_name(bad: dict[str, object], param: str) -> None:
    with pytest.raises(RequestError) as refused:
        check_request(replace(GOOD, **bad), INFO)
    assert refused.value.param == param


@pytest.mark.parametrize("output", [0, 100])
def test_lengths_up_to_the_context(output: int) -> None:
    sampling = SamplingParams(max_tokens=2**31 - 1)
    longest = Request(id="a", prompt=(7,) * (511 - output), output=(5,) * output, sampling=sampling)
    check_request(longest, INFO)
    with pytest.raises(PromptTooLong):
        check_request(replace(longest, prompt=(*longest.prompt, 7)), INFO)


def test_the_extremes_that_are_allowed() -> None:
    widest = SamplingParams(
        temperature=0.0,
        top_k=-1,
        top_p=2.0**-20,
        min_p=1.0,
        repetition_penalty=2.0**-20,
        presence_penalty=-2.0,
        frequency_penalty=2.0,
        logit_bias=tuple((token, -100.0) for token in range(300)),
        allowed_token_ids=tuple(range(410)),
        bad_token_ids=tuple(range(409)),
        seed=-(2**63),
        max_tokens=2**31 - 1,
        stop_token_ids=tuple(range(1, 33)),
        logprobs=20,
        prompt_logprobs=0,
    )
    check_request(replace(GOOD, sampling=widest, deadline_s=0.0), INFO)
    check_request(replace(GOOD, tenant="x" * 256, tenant_slots=2**31 - 1), INFO)
    check_request(replace(GOOD, sampling=SamplingParams(stop_token_ids=(5,) * 40)), INFO)
    check_request(replace(GOOD, sampling=SamplingParams(max_tokens=510, min_tokens=510)), INFO)
