"""Reasoning and text, apart: examples, any split, and what tells formats apart."""

import itertools
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jserve.core.errors import ConfigError
from jserve.gateway.reasoning.format import ReasoningPart
from jserve.gateway.reasoning.formats import FORMATS, detect_format, named_format
from jserve.gateway.reasoning.tagged import GEMMA_4, MISTRAL, THINK
from jserve.gateway.tools.format import Tool
from jserve.gateway.tools.formats import FORMATS as TOOL_FORMATS

HARMONY = FORMATS["openai_gptoss"]
EACH = pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda fmt: fmt.name)


def parse(fmt, pieces, *, starts_inside=False) -> tuple[str, str]:
    parser = fmt.parser(starts_inside=starts_inside)
    reasoning: list[str] = []
    text: list[str] = []
    for part in [*itertools.chain.from_iterable(map(parser.feed, pieces)), *parser.finish()]:
        assert part.text
        (reasoning if isinstance(part, ReasoningPart) else text).append(part.text)
    return "".join(reasoning), "".join(text)


def check(fmt, given_text, reasoning, text, *, starts_inside=False):
    assert parse(fmt, [given_text], starts_inside=starts_inside) == (reasoning, text)
    for size in (1, 2, 3, 7):
        pieces = [given_text[i : i + size] for i in range(0, len(given_text), size)]
        assert parse(fmt, pieces, starts_inside=starts_inside) == (reasoning, text)


@pytest.mark.parametrize(
    ("given_text", "reasoning", "text"),
    [
        # Qwen 3, DeepSeek R1, SmolLM3
        ("<think>\nTwo and two.\n</think>\n\nFour.", "Two and two.", "Four."),
        ("\n<think>a\n\nb</think>c\n", "a\n\nb", "c\n"),
        ("<think>\n\n</think>\n\nFour.", "", "Four."),
        ("<think>Hm, ", "Hm,", ""),
        ("<think>a</think>b <think>c</think>", "a", "b <think>c</think>"),
        ("<think>a < b </ think></think> c", "a < b </ think>", "c"),
        ("<think><think>a</think></think>", "<think>a", "</think>"),
        # None of it
        ("  Four.\n", "", "  Four.\n"),
        ("", "", ""),
        (" <thin", "", " <thin"),
        ("Say <think> aloud</think>", "", "Say <think> aloud</think>"),
    ],
)
def test_think(given_text, reasoning, text):
    check(THINK, given_text, reasoning, text)


@pytest.mark.parametrize(
    ("given_text", "reasoning", "text"),
    [
        ("Two and two.\n</think>\n\nFour.", "Two and two.", "Four."),
        ("<think>\na\n</think>b", "a", "b"),  # the model repeats the tag
        ("\n</think>b", "", "b"),
        ("never ends", "never ends", ""),
    ],
)
def test_think_opened_by_the_prompt(given_text, reasoning, text):
    check(THINK, given_text, reasoning, text, starts_inside=True)


@pytest.mark.parametrize(
    ("fmt", "given_text", "reasoning", "text"),
    [
        (MISTRAL, "[THINK]a[/THINK]b", "a", "b"),
        (MISTRAL, "b [THINK] a [/THINK] c\n", "a", "bc\n"),
        (GEMMA_4, "<|channel>thought\na\n<channel|>b", "a", "b"),
        (GEMMA_4, "<|channel>thought\n<channel|>b", "", "b"),
        (
            GEMMA_4,
            "<|channel>thought\na<channel|><|tool_call>call:f{}<tool_call|>",
            "a",
            "<|tool_call>call:f{}<tool_call|>",
        ),
    ],
)
def test_special_tokens_anywhere(fmt, given_text, reasoning, text):
    check(fmt, given_text, reasoning, text)


ANALYSIS = "<|channel|>analysis<|message|>"
NEXT = "<|end|><|start|>assistant"
CALL = "<|channel|>commentary to=functions.f<|message|>{}<|call|>"


@pytest.mark.parametrize(
    ("given_text", "reasoning", "text"),
    [
        (f"{ANALYSIS}Hm.{NEXT}<|channel|>final<|message|>Four.<|return|>", "Hm.", "Four."),
        ("<|channel|>final<|message|>Four.", "", "Four."),
        (f"{ANALYSIS}a{NEXT}{ANALYSIS}b{NEXT}<|channel|>final<|message|>c", "a\nb", "c"),
        (f"{ANALYSIS}cut o", "cut o", ""),
        (f"{ANALYSIS}a<|end|><|start|>assi", "a", ""),
        (f"{ANALYSIS}a<|channel|>final<|message|>b", "a", "b"),  # without an end
        ("<|channel|>commentary<|message|>I'll look." + NEXT + CALL, "", "I'll look." + CALL),
        # The header of a call, in the forms that models write it
        (
            "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{}<|call|>",
            "",
            CALL,
        ),
        (" to=functions.f<|channel|>commentary json<|message|>{}<|call|>", "", CALL),
        (f"{ANALYSIS}a{NEXT} to=functions.f<|channel|>commentary<|message|>{{}}", "a", CALL[:-8]),
        ("<|channel|>analysis to=python code<|message|>1+1<|call|>", "1+1", ""),
        ("No header", "", "No header"),
    ],
)
def test_harmony(given_text, reasoning, text):
    check(HARMONY, given_text, reasoning, text)


def test_harmony_calls_reach_the_tool_parser():
    text = f"{ANALYSIS}Hm.{NEXT} to=functions.f<|channel|>commentary <|constrain|>json<|message|>"
    reasoning, rest = parse(HARMONY, [text, '{"a": 1}<|call|>'])
    parts = TOOL_FORMATS["harmony"].parser([Tool("f")]).feed(rest)
    assert reasoning == "Hm."
    assert [(part.name, part.arguments) for part in parts] == [("f", '{"a": 1}')]


@EACH
@given(data=st.data())
def test_any_split_gives_the_same(fmt, data):
    fragments = [
        *fmt.markers,
        "<",
        "|",
        "analysis",
        "to=functions.f",
        " ",
        "\n",
        "a",
        "final",
        "[",
        "thought",
    ]
    text = "".join(data.draw(st.lists(st.sampled_from(fragments), max_size=12)))
    cuts = data.draw(st.lists(st.integers(0, len(text)), max_size=12))
    starts_inside = data.draw(st.booleans())
    borders = [0, *sorted(cuts), len(text)]
    pieces = [text[a:b] for a, b in itertools.pairwise(borders)]
    whole = parse(fmt, [text], starts_inside=starts_inside)
    assert parse(fmt, pieces, starts_inside=starts_inside) == whole


@EACH
@pytest.mark.parametrize("word", ["word ", " ", "\n", "<", "é", "["])
def test_each_piece_takes_the_same_time(fmt, word):
    def seconds(num_pieces: int) -> float:
        start = time.thread_time()
        parse(fmt, [fmt.start + "x", *[word] * num_pieces, "x" + fmt.end, *[word] * num_pieces])
        return time.thread_time() - start

    seconds(100)
    few, many = (min(seconds(count) for _ in range(3)) for count in (2_000, 32_000))
    # Quadratic work would take 256 times as long for 16 times the pieces. The best of three: a
    # collection of garbage takes long where many tests have run.
    assert many < 80 * max(few, 0.005)


@EACH
def test_markers_over_and_over(fmt):
    def seconds(num_times: int) -> float:
        start = time.thread_time()
        parse(fmt, ["".join(fmt.markers) * num_times])
        return time.thread_time() - start

    seconds(100)
    few, many = (min(seconds(count) for _ in range(3)) for count in (4_000, 32_000))
    assert many < 30 * max(few, 0.005)


@EACH
def test_whether_the_prompt_opens_it(fmt):
    assert fmt.starts_inside(f"user: hi\nassistant: {fmt.start}\n")
    assert not fmt.starts_inside("user: hi\nassistant: ")
    assert not fmt.starts_inside(f"assistant: {fmt.start}\n\n{fmt.end}\n\n")
    assert not fmt.starts_inside(f"user: what is {fmt.start}?\nassistant: ")
    half = f"{fmt.start}Well"
    assert fmt.starts_inside(f"user: hi\nassistant: {half}", continued=half)
    assert not fmt.starts_inside("user: hi\nassistant: Well", continued="Well")


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{% if enable_thinking %}<think>{% endif %}", "think"),
        ("{{ content.split('</think>')[-1] }}", "think"),
        ("[SYSTEM_PROMPT] [THINK] [/THINK]", "mistral"),
        ("<|channel|>analysis<|message|>", "openai_gptoss"),
        ("<|channel>thought <channel|>", "gemma4"),
        ("<|im_start|>{{ messages }}", None),
        (None, None),
    ],
)
def test_detects_what_a_template_writes(template, name):
    found = detect_format(template)
    assert (None if found is None else found.name) == name


def test_names_and_aliases():
    assert named_format("deepseek_r1") is named_format("qwen3") is THINK
    assert named_format("openai_gptoss") is HARMONY
    with pytest.raises(ConfigError, match="qwen3"):
        named_format("qwen")
