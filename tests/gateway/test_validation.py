"""Every sampling field: its range, its default, its message."""

import json
import math
from dataclasses import fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jserve.core.errors import ConfigError, PromptTooLong, RequestError
from jserve.core.request import SamplingParams
from jserve.gateway.config import GatewayConfig
from jserve.gateway.defaults import SamplingDefaults, sampling_defaults
from jserve.gateway.grpc_messages import sampling_fields
from jserve.gateway.http.openai_request import parse_completion
from jserve.gateway.validation import SamplingFields, check_prompt, check_stop, resolve_sampling
from jserve.proto.convert import sampling_to_proto
from tests.gateway.fixtures import INFO
from tests.sampling_values import unusual_sampling


def resolve(*, defaults=SamplingDefaults(), info=INFO, prompt_tokens=10, **given) -> SamplingParams:  # noqa: B008
    return resolve_sampling(
        SamplingFields(**given),
        defaults=defaults,
        info=info,
        prompt_tokens=prompt_tokens,
        make_seed=lambda: 77,
    )


def refused(**given) -> RequestError:
    with pytest.raises(RequestError) as caught:
        resolve(**given)
    return caught.value


def test_nothing_given_is_neutral():
    assert resolve() == SamplingParams(seed=77, max_tokens=502)


def test_defaults_fill_only_what_is_not_given():
    defaults = SamplingDefaults(temperature=0.6, top_k=40, top_p=0.9, min_p=0.1, max_tokens=100)
    sampling = resolve(defaults=defaults, top_k=0, temperature=0)
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.0, 0, 0.9)
    assert (sampling.min_p, sampling.max_tokens) == (0.1, 100)
    # A default never makes a long prompt fail.
    assert resolve(defaults=defaults, prompt_tokens=500).max_tokens == 12


ACCEPTED = {
    "temperature": [0, 0.5, 2, 100],
    "top_k": [-1, 0, 1, 2**31 - 1],
    "top_p": [1e-6, 1, 1.0],
    "min_p": [0, 1],
    "repetition_penalty": [0.1, 2],
    "presence_penalty": [-2, 2],
    "frequency_penalty": [-2.0, 2],
    "logit_bias": [{}, {"5": 1}, {409: -100.0}],
    "allowed_token_ids": [[3], [0, 409]],
    "bad_token_ids": [[], [3, 3]],
    "seed": [0, -1, 2**63 - 1, -(2**63)],
    "max_tokens": [1, 502],
    "min_tokens": [0, 502],
    "ignore_eos": [True, False],
    "stop_token_ids": [[], list(range(3, 33))],
    "logprobs": [0, 20],
    "prompt_logprobs": [0, 20],
}
REFUSED = {
    "temperature": [-0.1, 101, math.nan, math.inf, True, "1", [1]],
    "top_k": [-2, 2**31, 1.0, True],
    "top_p": [0, -1, 1.1, math.nan],
    "min_p": [-0.1, 1.1],
    "repetition_penalty": [0, -1, math.inf],
    "presence_penalty": [-2.1, 2.1],
    "frequency_penalty": [3, math.nan],
    "logit_bias": [[], {"-5": 1}, {"x": 1}, {"٧": 1}, {410: 1}, {5: math.nan}, {5: 101}, {5: None}],
    "allowed_token_ids": [[], [410], [-1], ["3"], [True], 3, "abc"],
    "bad_token_ids": [[410], [1.0]],
    "seed": [2**63, -(2**63) - 1, 1.5],
    "max_tokens": [0, -1, 1.0],
    "min_tokens": [-1, 503],
    "ignore_eos": [1, "true"],
    "stop_token_ids": [[410], list(range(3, 34))],
    "logprobs": [-1, 21, True],
    "prompt_logprobs": [-1, 21],
}


def test_the_tables_name_every_field():
    names = {field.name for field in fields(SamplingParams)}
    assert ACCEPTED.keys() == REFUSED.keys() == names == {f.name for f in fields(SamplingFields)}


def _from_grpc(sampling: SamplingParams) -> SamplingFields:
    return sampling_fields(sampling_to_proto(sampling))


def _from_json(sampling: SamplingParams) -> SamplingFields:
    body = {it.name: getattr(sampling, it.name) for it in fields(sampling)}
    body |= {"prompt": "x", "logit_bias": {str(key): value for key, value in sampling.logit_bias}}
    return parse_completion(json.loads(json.dumps(body))).sampling


@pytest.mark.parametrize("front_end", [_from_grpc, _from_json])
def test_every_field_passes_a_front_end_and_the_checks(front_end):
    sampling = unusual_sampling()
    given = front_end(sampling)
    resolved = resolve_sampling(given, defaults=SamplingDefaults(), info=INFO, prompt_tokens=10)
    assert resolved == sampling


@pytest.mark.parametrize("name", ACCEPTED)
def test_bounds_are_inside(name):
    for value in ACCEPTED[name]:
        resolve(**{name: value})


@pytest.mark.parametrize("name", REFUSED)
def test_beyond_the_bounds_the_field_is_named(name):
    for value in REFUSED[name]:
        error = refused(**{name: value})
        assert name in str(error)
        assert error.param is not None
        assert error.param.startswith(name)


def test_normal_forms():
    assert resolve(top_k=-1).top_k == 0
    assert resolve(top_k=10**6).top_k == INFO.vocab
    assert resolve(bad_token_ids=[4, 3, 4]).bad_token_ids == (4, 3)
    assert resolve(logit_bias={"9": 1, "8": -1}).logit_bias == ((8, -1.0), (9, 1.0))
    assert resolve(temperature=1e-30).temperature == 0.01  # vLLM does the same
    assert resolve(seed=5).seed == 5


def test_limits_count_what_the_device_must_hold():
    message = str(refused(stop_token_ids=list(range(3, 34))))
    assert "at most 30 fit beside the model's 2 end-of-sequence ids" in message
    resolve(stop_token_ids=list(range(1, 33)))  # the model's own ids among them
    assert "at most 300" in str(refused(logit_bias=dict.fromkeys(range(301), 1.0)))
    assert "twice" in str(refused(logit_bias={5: 1.0, "5": 2.0}))


@pytest.mark.parametrize("field", ["top_p", "repetition_penalty"])
def test_numbers_too_small_for_the_device_are_not_its_zero(field):
    assert np.float32(getattr(resolve(**{field: 1e-50}), field)) > 0


def test_masks_that_leave_nothing_are_refused():
    assert "no token" in str(refused(allowed_token_ids=[3], bad_token_ids=[3]))
    assert "no token" in str(refused(bad_token_ids=list(range(INFO.vocab))))
    assert "no token" in str(refused(allowed_token_ids=[1], min_tokens=1))
    # End-of-sequence ids are masked until min_tokens, though they end nothing; as in vLLM.
    assert "no token" in str(refused(allowed_token_ids=[1], min_tokens=1, ignore_eos=True))
    resolve(allowed_token_ids=[1])


def test_context_is_kept_with_numbers():
    error = refused(max_tokens=503)
    assert isinstance(error, PromptTooLong)
    assert "10 prompt tokens + max_tokens 503 = 513 exceed" in str(error)
    assert "max_tokens to at most 502" in str(error)
    with pytest.raises(PromptTooLong, match="has 512 tokens"):
        check_prompt([3] * 512, INFO)
    assert check_prompt([3] * 511, INFO) == (3,) * 511
    with pytest.raises(RequestError, match="empty"):
        check_prompt([], INFO)
    for wrong in ([410], [-1], [True], ["a"], [None], [1.0]):
        with pytest.raises(RequestError, match="prompt holds"):
            check_prompt(wrong, INFO)


@given(
    value=st.one_of(
        st.floats(), st.integers(), st.text(max_size=3), st.booleans(), st.lists(st.integers())
    ),
    name=st.sampled_from([f.name for f in fields(SamplingFields)]),
)
def test_any_value_is_resolved_or_refused(value, name):
    try:
        sampling = resolve(**{name: value})
    except RequestError as error:
        sampling, message = SamplingParams(), str(error)
    else:
        message = ""
    assert len(message) < 300
    numbers = [value for f in fields(sampling) if type(value := getattr(sampling, f.name)) is float]
    assert all(map(math.isfinite, numbers))


def test_stop_strings():
    def check(value):
        return check_stop(value, max_count=2, max_chars=3)

    assert check(None) == ()
    assert check("a") == ("a",)
    assert check(["a", "bcd"]) == ("a", "bcd")
    for wrong in ("", [""], "abcd", ["a"] * 3, [1], 1, {"a": 1}):
        with pytest.raises(RequestError, match="stop"):
            check(wrong)


def test_generation_config_gives_the_defaults():
    config = GatewayConfig()
    assert sampling_defaults({"eos_token_id": 2}, config) == SamplingDefaults()
    llama = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "max_new_tokens": 64}
    expected = SamplingDefaults(temperature=0.6, top_p=0.9, max_tokens=64)
    assert sampling_defaults(llama, config) == expected
    ours = replace(config, default_temperature=0.1, default_max_tokens=8)
    assert sampling_defaults(llama, ours) == replace(expected, temperature=0.1, max_tokens=8)
    assert sampling_defaults({"do_sample": False, "temperature": 0.6}, config).temperature == 0
    with pytest.raises(ConfigError, match="top_p"):
        sampling_defaults({"top_p": "x"}, config)


@pytest.mark.parametrize(
    ("given", "field", "value"),
    [
        # Each of these switches its rule off, in transformers or in vLLM.
        ({"top_k": -1}, "top_k", 0),
        ({"top_k": 0}, "top_k", 0),
        ({"top_k": None}, "top_k", 0),
        ({"top_p": None}, "top_p", 1.0),
        ({"min_p": None}, "min_p", 0.0),
        ({"temperature": None}, "temperature", 1.0),
        ({"repetition_penalty": None}, "repetition_penalty", 1.0),
        ({"max_new_tokens": None}, "max_tokens", None),
        ({"max_new_tokens": -1}, "max_tokens", None),
        ({"top_k": 50.0}, "top_k", 50),
        ({"max_new_tokens": 2048.0}, "max_tokens", 2048),
        ({"top_p": 1}, "top_p", 1.0),
        ({"temperature": 0}, "temperature", 0.0),
    ],
)
def test_neutral_values_of_a_generation_config(given, field, value):
    defaults = sampling_defaults(given, GatewayConfig())
    assert getattr(defaults, field) == value
    assert resolve(defaults=defaults).max_tokens > 0


@pytest.mark.parametrize(
    "given",
    [
        {"top_k": -2},
        {"top_k": 1.5},
        {"top_k": True},
        {"top_k": float("nan")},
        {"top_p": 0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"temperature": float("inf")},
        {"temperature": -1},
        {"repetition_penalty": 0},
        {"max_new_tokens": 0},
        {"max_new_tokens": "many"},
    ],
)
def test_impossible_values_of_a_generation_config_are_named(given):
    ((name, value),) = given.items()
    with pytest.raises(ConfigError, match=f"generation config: {name}"):
        sampling_defaults(given, GatewayConfig())
    ours = "max_tokens" if name == "max_new_tokens" else name
    with pytest.raises(ConfigError, match=f"gateway.default_{ours}"):
        sampling_defaults({}, replace(GatewayConfig(), **{f"default_{ours}": value}))


@pytest.mark.parametrize("top_k", [-1, 0])
def test_a_configs_own_top_k_may_be_off(top_k):
    config = replace(GatewayConfig(), default_top_k=top_k)
    assert sampling_defaults({"top_k": 40}, config).top_k == 0
