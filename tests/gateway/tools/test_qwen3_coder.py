import pytest
from hypothesis import given

from jserve.core.errors import RequestError
from jserve.gateway.tools.format import Tool
from jserve.gateway.tools.qwen3_coder import Qwen3Coder
from tests.gateway.tools.calls import AUTO, Matcher, check, check_splits, splits


def call(name, *parameters):
    lines = [f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in parameters]
    return f"<tool_call>\n<function={name}>\n{''.join(lines)}</function>\n</tool_call>"


PARIS = call("get_weather", ("city", "Paris"))
CALL = ("get_weather", {"city": "Paris"})


@pytest.mark.parametrize(
    ("given_text", "text", "calls"),
    [
        (PARIS, "", [CALL]),
        (f"Sure.\n\n{PARIS}\n{PARIS}", "Sure.", [CALL] * 2),
        (call("now"), "", [("now", {})]),
        (
            call("get_weather", ("city", "12"), ("days", "3")),
            "",
            [("get_weather", {"city": "12", "days": 3})],
        ),
        (
            call("search", ("query", 'a "b"\n\n</param> \\d'), ("page", "null"), ("tags", '["a"]')),
            "",
            [("search", {"query": 'a "b"\n\n</param> \\d', "page": None, "tags": ["a"]})],
        ),
        (
            call("search", ("filter", '{"exact": true}'), ("more", "[1"), ("other", "True")),
            "",
            [("search", {"filter": {"exact": True}, "more": "[1", "other": True})],
        ),
        (
            call("search", ("page", "two"), ("query", "")),
            "",
            [("search", {"page": "two", "query": ""})],
        ),
        ("<function=now>\n</function>", "", [("now", {})]),
        (
            "<tool_call>\n<function=now>\n</function>\n<function=now></function>\n</tool_call>",
            "",
            [("now", {}), ("now", {})],
        ),
        (
            "<tool_call><function=search><parameter=query>x</parameter></function></tool_call>",
            "",
            [("search", {"query": "x"})],
        ),
        # No calls
        (call("rm", ("path", "/")), call("rm", ("path", "/")), []),
        ("<tool_call>\nwhat", "<tool_call>\nwhat", []),
        ("a <function", "a <function", []),
    ],
)
def test_examples(given_text, text, calls):
    check(Qwen3Coder(), given_text, text, calls)


FRAGMENTS = [
    "<tool_call>",
    "<function=",
    "now",
    ">",
    "<parameter=a>",
    "\n",
    "</parameter>",
    "</function>",
    "</tool_call>",
    "search",
    "<parameter=query>",
    "1",
    '"',
    "\\",
    "<",
    "</",
    " ",
]


@given(splits(FRAGMENTS))
def test_any_split_gives_the_same(pieces):
    check_splits(Qwen3Coder(), ["<function=search>", *pieces])


@pytest.mark.parametrize("special", [(), ("<tool_call>", "</tool_call>")])
def test_grammar(special):
    matcher = Matcher(Qwen3Coder(), special=special)
    days = call("get_weather", ("city", "a </p>\nb"), ("days", "3"), ("unit", "celsius"))
    assert matcher.accepts(PARIS)
    assert matcher.accepts(f"{PARIS}\n{days}")
    assert matcher.accepts(call("search", ("query", "x"), ("page", "null")))
    assert not matcher.reads(days.replace("\n3", "\nthree"))
    assert not matcher.reads(days.replace("celsius", "kelvin"))
    assert not matcher.reads("<tool_call>\n<function=get_weather>\n<parameter=days>")
    auto = Matcher(Qwen3Coder(), AUTO, special=special)
    assert auto.accepts(f"Sure. {PARIS}")
    assert auto.accepts(call("search", ("anything", "x"), ("more", "y")))
    assert not auto.reads("<tool_call>\n<function=get_weather>\n<parameter=town>")


def test_refuses_a_schema_that_it_cannot_bind():
    tool = Tool("f", parameters={"properties": {"a": {"type": "string", "pattern": "a+"}}})
    with pytest.raises(RequestError, match="pattern"):
        Matcher(Qwen3Coder(), tools=(tool,))
