"""OpenAI bodies: fields that are read, accepted without effect, or refused by name."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

from jserve.core.errors import RequestError
from jserve.gateway.http.fields import Fields
from jserve.gateway.http.openai_fields import (
    CHAT_FIELDS,
    COMPLETION_FIELDS,
    UNSUPPORTED_CHAT,
    UNSUPPORTED_COMPLETION,
)
from jserve.gateway.http.openai_request import parse_chat, parse_completion
from jserve.gateway.tools.format import ChoiceMode, ToolChoice

PARSERS = {
    "completion": lambda fields: parse_completion({"prompt": "x", **fields}),
    "chat": lambda fields: parse_chat({"messages": [{"role": "user", "content": "x"}], **fields}),
}


def refusal(kind: str, fields: dict[str, Any]) -> RequestError:
    with pytest.raises(RequestError) as caught:
        PARSERS[kind](fields)
    return caught.value


@pytest.mark.parametrize("kind", PARSERS)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("stream", 1),
        ("stream", "yes"),
        ("n", "2"),
        ("n", 1.5),
        ("n", True),
        ("n", 0),
        ("n", -1),
        ("model", 5),
        ("priority", "high"),
        ("skip_special_tokens", 0),
        ("include_stop_str_in_output", "no"),
        ("user", 5),
        ("metadata", []),
        ("store", "no"),
        ("stream_options", True),
        ("best_of", 0),
        ("suffix", "tail"),
        ("response_format", "text"),
        ("use_beam_search", True),
        ("length_penalty", 2),
        ("no_such_field", 1),
        ("no_such_field", None),
    ],
)
def test_a_bad_field_is_named(kind: str, field: str, value: object) -> None:
    error = refusal(kind, {field: value})
    assert error.param == field
    assert field in str(error)


@pytest.mark.parametrize("kind", PARSERS)
def test_every_field_of_the_openai_client_is_known(kind: str) -> None:
    if kind == "completion":
        theirs = completion_create_params.CompletionCreateParamsBase.__annotations__
        mine = {*COMPLETION_FIELDS, *UNSUPPORTED_COMPLETION}
    else:
        theirs = chat_create_params.CompletionCreateParamsBase.__annotations__
        mine = {*CHAT_FIELDS, *UNSUPPORTED_CHAT}
    assert theirs.keys() <= mine


@pytest.mark.parametrize(
    ("kind", "unsupported"), [("completion", UNSUPPORTED_COMPLETION), ("chat", UNSUPPORTED_CHAT)]
)
def test_nulls_and_neutral_values_pass(
    kind: str, unsupported: dict[str, tuple[object, ...]]
) -> None:
    plain = PARSERS[kind]({})
    assert PARSERS[kind](dict.fromkeys(unsupported)) == plain
    for field, values in unsupported.items():
        for value in values:
            assert PARSERS[kind]({field: value}) == plain
    fields = set(COMPLETION_FIELDS if kind == "completion" else CHAT_FIELDS)
    assert PARSERS[kind](dict.fromkeys(fields - {"prompt", "messages"})) == plain


def test_json_keeps_true_and_one_apart() -> None:
    assert refusal("chat", {"use_beam_search": 0}).param == "use_beam_search"
    assert refusal("chat", {"length_penalty": True}).param == "length_penalty"


def test_what_comes_later_says_so() -> None:
    assert "not supported yet" in str(refusal("chat", {"use_beam_search": True}))


F, G = ({"type": "function", "function": {"name": name}} for name in "fg")


@pytest.mark.parametrize(
    ("param", "fields"),
    [
        ("tools", {"tools": "f"}),
        ("tools", {"tools": [{"function": {"name": f"f{i}"}} for i in range(1000)]}),
        ("tools", {"tool_choice": "required"}),
        ("tools", {"tool_choice": F, "tools": []}),
        ("tools[0]", {"tools": ["f"]}),
        ("tools[0].type", {"tools": [{"type": "web_search"}]}),
        ("tools[0].function", {"tools": [{"type": "function"}]}),
        ("tools[1].function.name", {"tools": [F, F]}),
        ("tools[0].function.name", {"tools": [{"function": {"name": "a b"}}]}),
        ("tools[0].function.name", {"tools": [{"function": {"name": "x" * 129}}]}),
        ("tools[0].function.name", {"tools": [{"function": {}}]}),
        ("tools[0].function.strict", {"tools": [{"function": {"name": "f", "strict": 1}}]}),
        (
            "tools[0].function.parameters",
            {"tools": [{"function": {"name": "f", "parameters": []}}]},
        ),
        (
            "tools[0].function.description",
            {"tools": [{"function": {"name": "f", "description": 1}}]},
        ),
        ("functions", {"functions": [{"name": "f"}], "tools": [F]}),
        ("functions[0].name", {"functions": [{}]}),
        ("function_call", {"functions": [{"name": "f"}], "function_call": "required"}),
        ("tool_choice", {"tools": [F], "tool_choice": "any"}),
        ("tool_choice", {"tools": [F], "tool_choice": G}),
        ("tool_choice", {"tools": [F], "tool_choice": {"type": "function"}}),
        ("parallel_tool_calls", {"tools": [F], "parallel_tool_calls": "no"}),
    ],
)
def test_bad_tools_are_named(param: str, fields: dict[str, Any]) -> None:
    error = refusal("chat", fields)
    assert error.param == param
    assert param in str(error)


def test_tools_are_no_field_of_completions() -> None:
    assert refusal("completion", {"tools": [F]}).param == "tools"


def test_the_older_form_of_tools_is_read() -> None:
    older = {"functions": [F["function"], G["function"]], "function_call": {"name": "g"}}
    named = {"type": "function", "function": {"name": "g"}}
    newer = {"tools": [F, G], "tool_choice": named}
    assert PARSERS["chat"](older).tools == PARSERS["chat"](newer).tools
    assert PARSERS["chat"]({"functions": [], "function_call": "auto"}) == PARSERS["chat"]({})


def test_allowed_tools_are_those_that_may_be_called() -> None:
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [G]}}
    asked = PARSERS["chat"]({"tools": [F, G], "tool_choice": choice}).tools
    assert [tool.name for tool in asked.tools] == ["g"]
    assert asked.choice == ToolChoice(ChoiceMode.REQUIRED)


def test_a_typo_gets_a_hint() -> None:
    assert "'temperature'" in str(refusal("chat", {"temperatur": 1}))
    long = "x" * 1000
    assert len(str(refusal("chat", {long: 1}))) < 200


@pytest.mark.parametrize(
    ("prompt", "parsed"),
    [
        ("ab", ("ab",)),
        ("", ("",)),
        (["a", "b"], ("a", "b")),
        ([1, 2], ((1, 2),)),
        ([[1], [2, 3], []], ((1,), (2, 3), ())),
    ],
)
def test_prompts(prompt: object, parsed: object) -> None:
    assert parse_completion({"prompt": prompt}).prompts == parsed


@pytest.mark.parametrize(
    "prompt", [None, [], 5, True, {}, ["a", 1], [1, "a"], [1, True], [1.5], [[1], "a"], [[1, "a"]]]
)
def test_bad_prompts(prompt: object) -> None:
    with pytest.raises(RequestError) as caught:
        parse_completion({"prompt": prompt})
    assert (caught.value.param or "").startswith("prompt")


def test_stream_options() -> None:
    on = {"stream": True}
    assert PARSERS["chat"](on | {"stream_options": {"include_usage": True}}).include_usage
    assert not PARSERS["chat"](on | {"stream_options": {}}).include_usage
    for options, expected in (
        ({"continuous_usage_stats": True}, (True, True)),  # as in vLLM
        ({"include_usage": True, "continuous_usage_stats": True}, (True, True)),
        ({"include_usage": True, "continuous_usage_stats": False}, (True, False)),
        ({"include_usage": False, "continuous_usage_stats": True}, (False, False)),
        ({"include_usage": True, "include_obfuscation": True}, (True, False)),
    ):
        parsed = PARSERS["completion"](on | {"stream_options": options})
        assert (parsed.include_usage, parsed.continuous_usage) == expected
    assert refusal("chat", {"stream_options": {"include_usage": True}}).param == "stream_options"
    error = refusal("chat", on | {"stream_options": {"include_usage": 1}})
    assert error.param == "stream_options.include_usage"
    error = refusal("chat", on | {"stream_options": {"every": 2}})
    assert error.param == "stream_options.every"


def test_chat_logprobs() -> None:
    assert PARSERS["chat"]({}).sampling.logprobs is None
    assert PARSERS["chat"]({"logprobs": True}).sampling.logprobs == 0
    assert PARSERS["chat"]({"logprobs": True, "top_logprobs": 5}).sampling.logprobs == 5
    assert PARSERS["chat"]({"top_logprobs": 0}).sampling.logprobs is None
    assert PARSERS["chat"]({"logprobs": False, "top_logprobs": 0}).sampling.logprobs is None
    for bad in ({"top_logprobs": 2}, {"top_logprobs": -1}, {"logprobs": True, "top_logprobs": 21}):
        assert refusal("chat", bad).param == "top_logprobs"
    assert refusal("chat", {"logprobs": 3}).param == "logprobs"


def test_the_two_names_of_max_tokens() -> None:
    assert PARSERS["chat"]({"max_tokens": 5}).sampling.max_tokens == 5
    assert PARSERS["chat"]({"max_completion_tokens": 6}).sampling.max_tokens == 6
    assert PARSERS["chat"]({"max_completion_tokens": 6, "max_tokens": 6}).sampling.max_tokens == 6
    # As in vLLM, the newer name counts.
    assert PARSERS["chat"]({"max_completion_tokens": 6, "max_tokens": 5}).sampling.max_tokens == 6
    assert PARSERS["chat"]({"max_completion_tokens": -1}).unlimited
    assert PARSERS["chat"]({"max_tokens": -1}).unlimited
    assert PARSERS["completion"]({"max_tokens": -1}).unlimited
    assert not PARSERS["completion"]({}).unlimited
    assert refusal("chat", {"max_completion_tokens": 0}).param == "max_completion_tokens"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)
NAMES = st.sampled_from(sorted({*COMPLETION_FIELDS, *CHAT_FIELDS, *UNSUPPORTED_CHAT})) | st.text()


@given(body=st.dictionaries(NAMES, JSON, max_size=6), kind=st.sampled_from(sorted(PARSERS)))
def test_any_json_is_read_or_refused(body: dict[str, Any], kind: str) -> None:
    caught: RequestError | None = None
    try:
        PARSERS[kind](body)
    except RequestError as error:
        caught = error
    assert caught is None or (caught.param is not None and len(str(caught)) < 300)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, "1", True, []])
def test_numbers_are_finite_numbers(value: object) -> None:
    with pytest.raises(RequestError, match=r"a\.x must be a finite number"):
        Fields({"x": value}, "a").number("x")


@pytest.mark.parametrize("kind", PARSERS)
@pytest.mark.parametrize(
    "field", ["top_k", "seed", "min_tokens", "max_tokens", "prompt_logprobs", "n", "priority"]
)
def test_integers_may_be_whole_floats(kind: str, field: str) -> None:
    assert PARSERS[kind]({field: 4.0}) == PARSERS[kind]({field: 4})
    if field in ("n", "priority"):
        assert refusal(kind, {field: 4.5}).param == field
    else:  # the request plane checks it
        assert type(getattr(PARSERS[kind]({field: 4.0}).sampling, field)) is int


def test_lists_of_integers_may_hold_whole_floats() -> None:
    sampling = PARSERS["chat"]({"stop_token_ids": [1.0, 2]}).sampling
    assert [type(it) for it in sampling.stop_token_ids] == [int, int]


HINTS = {
    "user": "u",
    "safety_identifier": "u",
    "prompt_cache_key": "k",
    "prompt_cache_retention": "24h",
    "verbosity": "low",
    "service_tier": "auto",
    "store": True,
    "metadata": {"a": "b"},
    "prediction": {"type": "content", "content": "x"},
}


@pytest.mark.parametrize("kind", PARSERS)
@pytest.mark.parametrize("field", HINTS)
def test_hints_change_nothing(kind: str, field: str) -> None:
    assert PARSERS[kind]({field: HINTS[field]}) == PARSERS[kind]({})
    assert refusal(kind, {field: 5}).param == field


def test_variables_of_the_template() -> None:
    variables = {"enable_thinking": False, "level": [1]}
    parsed = PARSERS["chat"]({"chat_template_kwargs": variables, "reasoning_effort": "low"})
    assert parsed.template_variables == {**variables, "reasoning_effort": "low"}
    own = {"chat_template_kwargs": {"reasoning_effort": "high"}, "reasoning_effort": "low"}
    assert PARSERS["chat"](own).template_variables == {"reasoning_effort": "high"}
    neutral = {"chat_template_kwargs": {"tools": None, "continue_final_message": False}}
    assert PARSERS["chat"](neutral) == PARSERS["chat"]({})
    for name, value in (("messages", [{}]), ("tools", [{}]), ("chat_template", "x")):
        error = refusal("chat", {"chat_template_kwargs": {name: value}})
        assert error.param == f"chat_template_kwargs.{name}"
    for bad in ({"chat_template_kwargs": "x"}, {"reasoning_effort": 3}):
        assert refusal("chat", bad).param in bad


@pytest.mark.parametrize("parse", [parse_chat, parse_completion])
def test_unknown_fields_are_named_where_they_are_ignored(parse: Any) -> None:
    body = {"prompt": "x", "messages": [], "mirostat": 2, "stream": True}
    body |= {"stream_options": {"every": 2}, "x" * 100: 1}
    body.pop("messages" if parse is parse_completion else "prompt")
    parsed = parse(body, ignore_unknown=True)
    assert parsed.ignored == ("stream_options.every", "mirostat", "x" * 57 + "...")
    with pytest.raises(RequestError, match="not supported yet"):  # known, and would change much
        parse(body | {"use_beam_search": True}, ignore_unknown=True)
