import pytest
from hypothesis import given

from jserve.gateway.tools.hermes import Hermes
from tests.gateway.tools.calls import AUTO, Matcher, check, check_splits, parse, splits

PARIS = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
CALL = ("get_weather", {"city": "Paris"})
TAGS = ("<tool_call>", "</tool_call>")


@pytest.mark.parametrize(
    ("given_text", "text", "calls"),
    [
        # Qwen 2.5 and 3, Hermes, SmolLM3
        (f"<tool_call>\n{PARIS}\n</tool_call>", "", [CALL]),
        (f"I'll look.\n<tool_call>\n{PARIS}\n</tool_call>", "I'll look.", [CALL]),
        (
            f"<tool_call>\n{PARIS}\n</tool_call>\n<tool_call>\n{PARIS}\n</tool_call>\n",
            "",
            [CALL] * 2,
        ),
        (f"<tool_call>{PARIS}</tool_call>\nDone.", "\nDone.", [CALL]),
        (f"<tool_call>\n{PARIS}", "", [CALL]),
        # SmolLM2
        (f"<tool_call>[\n{PARIS},\n{PARIS}\n]</tool_call>", "", [CALL] * 2),
        ("<tool_call>[]</tool_call>", "<tool_call>[]</tool_call>", []),
        # What models make of it
        (
            '<tool_call>{"arguments": {"city": "Oslo"}, "name": "get_weather"}</tool_call>',
            "",
            [("get_weather", {"city": "Oslo"})],
        ),
        (
            '<tool_call>{"id": 1, "name": "search", "parameters": {"query": "]"}}</tool_call>',
            "",
            [("search", {"query": "]"})],
        ),
        (
            '<tool_call>{"name": "search", "arguments": "{\\"query\\": \\"a\\"}"}</tool_call>',
            "",
            [("search", {"query": "a"})],
        ),
        ('<tool_call>{"name": "now"}</tool_call>', "", [("now", {})]),
        ('<tool_call>{"name": "now", "arguments": null}</tool_call>', "", [("now", {})]),
        ('<tool_call>{"name": "n\\u006fw", "arguments": {}}</tool_call>', "", [("now", {})]),
        (
            '<tool_call>{"name": "search", "arguments": {"query": "\\d+\n\\u12"}}</tool_call>',
            "",
            [("search", {"query": "\\d+\n\\u12"})],
        ),
        (f"<tool_call>\n{PARIS}\n{PARIS}\n</tool_call>", "", [CALL] * 2),
        (f"<tool_call>\n{PARIS}}}\n</tool_call>", "}\n</tool_call>", [CALL]),
        (f"<tool_call>\n{PARIS[:-1]}\n</tool_call>", "", [CALL]),
        (f"<tool_call> <tool_call>{PARIS}</tool_call>", "<tool_call> ", [CALL]),
        (
            '<tool_call>{"name": "search", "arguments": {"query": "<tool_call>"}}</tool_call>',
            "",
            [("search", {"query": "<tool_call>"})],
        ),
        (
            '<tool_call>{"name": "search", "arguments": {"query": "\\uD83D\\uDE00é😀"}}',
            "",
            [("search", {"query": "😀é😀"})],
        ),
        # No calls
        ("", "", []),
        ("  Just text.\n", "  Just text.\n", []),
        ("a <tool_cal", "a <tool_cal", []),
        (" <tool_call>\nHm.\n</tool_call>", " <tool_call>\nHm.\n</tool_call>", []),
        (
            '<tool_call>{"name": "rm", "arguments": {}}</tool_call>',
            '<tool_call>{"name": "rm", "arguments": {}}</tool_call>',
            [],
        ),
        (
            '<tool_call>{"name": "get_\\"weather", "arguments": {}}</tool_call>',
            '<tool_call>{"name": "get_\\"weather", "arguments": {}}</tool_call>',
            [],
        ),
        (
            '<tool_call>{"arguments": {}}</tool_call>',
            '<tool_call>{"arguments": {}}</tool_call>',
            [],
        ),
        (
            '<tool_call>{"name": "now", "arguments": [1]}</tool_call>',
            '<tool_call>{"name": "now", "arguments": [1]}</tool_call>',
            [],
        ),
        (f"<tool_call>[{PARIS}, {{}}]</tool_call>", ", {}]</tool_call>", [CALL]),
    ],
)
def test_examples(given_text, text, calls):
    check(Hermes(), given_text, text, calls)


FRAGMENTS = [
    *TAGS,
    PARIS,
    "\n",
    " ",
    "[",
    "]",
    ",",
    "{",
    "}",
    '"',
    "\\",
    "\\uD8",
    "3D",
    "<",
    "a",
    ":",
    '"name"',
    '"now"',
    '"arguments"',
    "{}",
    '{"name": "now", "arguments": {"a": ',
    "1.5e3",
    "tru",
]


@given(splits(FRAGMENTS))
def test_any_split_gives_the_same(pieces):
    check_splits(Hermes(), pieces)


def test_malformed_arguments_end_the_call():
    answer = parse(Hermes(), '<tool_call>{"name": "now", "arguments": {"a": oops}}</tool_call>')
    assert answer.calls == [("now", '{"a": ')]
    assert answer.text == "oops}}</tool_call>"


@pytest.mark.parametrize("special", [(), TAGS])
def test_grammar(special):
    one = f"<tool_call>\n{PARIS}\n</tool_call>"
    bad = one.replace("city", "town")
    matcher = Matcher(Hermes(), special=special, parallel=True)
    assert matcher.accepts(one)
    assert matcher.accepts(f"{one}\n{one}")
    assert not matcher.reads(bad)
    assert not matcher.reads("Hi")
    assert not Matcher(Hermes(), special=special, parallel=False).reads(f"{one}\n")
    auto = Matcher(Hermes(), AUTO, special=special)
    for text in ("", "Hi <", one, f"Hi\n{one}", f"{one}\n{one}"):
        assert auto.accepts(text), text
    assert not auto.reads(f"Hi {bad}")
    assert not auto.reads("Hi <tool_call>\nHm")
    # The tool that is not strict may have any arguments.
    assert auto.accepts('<tool_call>\n{"name": "search", "arguments": {"x": 1}}\n</tool_call>')
