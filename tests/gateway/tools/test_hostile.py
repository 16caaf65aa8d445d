"""Inputs that nobody means well with: every format, in bounded time, and nothing lost."""

import json
import time

import pytest

from jserve.gateway.tools.format import Tool
from jserve.gateway.tools.formats import FORMATS
from jserve.gateway.tools.values import MAX_DEPTH
from tests.gateway.tools.calls import TOOLS, parse

EACH = pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda fmt: fmt.name)

# For each format the beginning of a call, up to its argument, and how a string and a list begin.
BEGUN = {
    "hermes": ('<tool_call>{"name": "now", "arguments": {"a": ', '"', "["),
    "llama3_json": ('{"name": "now", "parameters": {"a": ', '"', "["),
    "generic_json": ('{"name": "now", "parameters": {"a": ', '"', "["),
    "mistral": ('[TOOL_CALLS]now[ARGS]{"a": ', '"', "["),
    "pythonic": ("[now(a=", "'", "["),
    "gemma3": ("```tool_code\nnow(a=", "'", "["),
    "qwen3_coder": ("<function=search><parameter=query>", "", "["),
    "functiongemma": ("<start_function_call>call:now{a:", "<escape>", "["),
    "harmony": ('<|channel|>commentary to=functions.now<|message|>{"a": ', '"', "["),
    "gemma4": ("<|tool_call>call:now{a:", '<|"|>', "["),
}


@EACH
@pytest.mark.parametrize(
    "text",
    [
        "[" * 1_000_000,
        "{" * 300_000,
        " " * 1_000_000,
        "<" * 300_000,
        '{"a":' * 100_000,
        '"' * 300_000,
    ],
    ids=["brackets", "braces", "spaces", "less", "objects", "quotes"],
)
def test_junk_is_text(fmt, text):
    assert parse(fmt, [text]).text == text
    pieces = [text[i : i + 1000] for i in range(0, len(text), 1000)]
    assert parse(fmt, pieces).text == text


@EACH
def test_markers_over_and_over_are_text(fmt):
    text = "".join(fmt.markers) * 20_000
    assert parse(fmt, [text]).text == text
    text = (fmt.markers or ("```json",))[0] * 20_000
    assert parse(fmt, [text]).text == text


@EACH
def test_each_piece_takes_the_same_time(fmt):
    begin, quote, _ = BEGUN[fmt.name]

    def seconds(num_pieces: int) -> float:
        start = time.thread_time()
        answer = parse(fmt, [begin + quote, *["word "] * num_pieces])
        assert len(answer.calls[0][1]) >= 5 * num_pieces
        return time.thread_time() - start

    seconds(100)
    # Quadratic work would take 64 times as long for 8 times the pieces.
    few, many = (min(seconds(count) for _ in range(3)) for count in (2_000, 16_000))
    assert many < 30 * max(few, 0.005)


@EACH
@pytest.mark.parametrize("num_pieces", [1, 50])
def test_deep_nesting_ends_the_call(fmt, num_pieces):
    begin, _, opening = BEGUN[fmt.name]
    deep = begin + opening * 100_000
    size = len(deep) // num_pieces
    answer = parse(fmt, [deep[i : i + size] for i in range(0, len(deep), size)])
    assert len(answer.calls) == 1
    if fmt.name != "qwen3_coder":  # to which it is a string
        assert answer.calls[0][1].count("[") <= MAX_DEPTH
        assert answer.text.strip("[") == ""
        assert answer.text.count("[") + answer.calls[0][1].count("[") == 100_000


@EACH
def test_strings_without_an_end(fmt):
    begin, quote, _ = BEGUN[fmt.name]
    answer = parse(fmt, [begin + quote, "é" * 100_000])
    assert answer.text == ""
    assert answer.calls[0][1].endswith("é" * 100_000)


@pytest.mark.parametrize(
    "name", ['qu"ote', "back\\slash", "new\nline", "naïve 工具", "</tool_call>"]
)
def test_names_that_need_escapes(name):
    tools = (*TOOLS, Tool(name))
    call = json.dumps({"name": name, "arguments": {name: name}})
    answer = parse(FORMATS["hermes"], f"<tool_call>\n{call}\n</tool_call>", tools)
    assert answer.text == ""
    assert [(called, json.loads(text)) for called, text in answer.calls] == [(name, {name: name})]


@pytest.mark.parametrize("cut", range(12))
def test_surrogates_cut_in_two(cut):
    text = '<tool_call>{"name": "now", "arguments": {"a": "\\uD83D\\uDE00"}}</tool_call>'
    at = text.index("\\uD8") + cut
    answer = parse(FORMATS["hermes"], [text[:at], text[at:]])
    assert json.loads(answer.calls[0][1]) == {"a": "😀"}


def test_a_marker_within_a_string_is_part_of_it():
    inner = "<tool_call>{}</tool_call>"
    call = json.dumps({"name": "search", "arguments": {"query": inner}})
    answer = parse(FORMATS["hermes"], f"<tool_call>{call}</tool_call>")
    assert json.loads(answer.calls[0][1]) == {"query": inner}


@EACH
def test_parts_follow_the_pieces(fmt):
    """What is certain is given out at once."""
    begin, quote, _ = BEGUN[fmt.name]
    parser = fmt.parser(TOOLS)
    assert [part.text for part in parser.feed("Hi there")] == ["Hi there"]
    parser = fmt.parser(TOOLS)
    assert parser.feed(begin + quote)[-1].name in ("now", "search")
    (part,) = parser.feed("some words")
    # A quote that may be the first of three comes with what follows it.
    assert (part.name, part.arguments.lstrip('"')) == (None, "some words")
