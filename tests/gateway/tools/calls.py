"""What the tests of call formats share: tools, parsing in pieces, a matcher with a tokenizer."""

import itertools
import json
from dataclasses import dataclass, field
from functools import cache

import llguidance
import numpy as np
from hypothesis import strategies as st
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from jserve.checkpoints.text_assets import byte_level_assets
from jserve.gateway.tools.format import (
    CallPart,
    ChoiceMode,
    Part,
    TextPart,
    Tool,
    ToolChoice,
    ToolFormat,
    WantedCalls,
)

WEATHER = Tool(
    "get_weather",
    "Says what the weather is.",
    {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer"},
            "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
        },
        "required": ["city"],
        "additionalProperties": False,
    },
    strict=True,
)
SEARCH = Tool(
    "search",
    "Finds documents.",
    {
        "type": "object",
        "properties": {
            "query": {"type": "string"},
            "filter": {
                "type": "object",
                "properties": {"exact": {"type": "boolean"}, "weight": {"type": "number"}},
                "required": ["exact"],
                "additionalProperties": False,
            },
            "tags": {"type": "array", "items": {"type": "string"}},
            "page": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
        },
        "required": ["query"],
        "additionalProperties": False,
    },
)
NOW = Tool("now", "Says the time.", {"type": "object", "properties": {}})
TOOLS = (WEATHER, SEARCH, NOW)

REQUIRED = ToolChoice(ChoiceMode.REQUIRED)
AUTO = ToolChoice(ChoiceMode.AUTO)


@dataclass
class Answer:
    """What the parts of an answer add up to."""

    text: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)

    def add(self, parts: list[Part]) -> None:
        for part in parts:
            if isinstance(part, TextPart):
                assert part.text
                self.text += part.text
                continue
            assert isinstance(part, CallPart)
            if part.name is not None:
                assert part.index == len(self.calls)
                self.calls.append((part.name, part.arguments))
            else:
                assert part.index == len(self.calls) - 1
                assert part.arguments
                name, arguments = self.calls[-1]
                self.calls[-1] = (name, arguments + part.arguments)


def parse(fmt: ToolFormat, pieces, tools=TOOLS) -> Answer:
    parser, answer = fmt.parser(tools), Answer()
    for piece in pieces:
        answer.add(parser.feed(piece))
    answer.add(parser.finish())
    return answer


def check(fmt: ToolFormat, given: str, text: str, calls, tools=TOOLS) -> None:
    """The example gives this text and these calls, whole, in pieces of any length, and cut off."""
    whole = parse(fmt, [given], tools)
    assert whole.text == text
    assert [(name, json.loads(arguments)) for name, arguments in whole.calls] == list(calls)
    for size in (1, 2, 3, 7, 16):
        pieces = [given[i : i + size] for i in range(0, len(given), size)]
        assert parse(fmt, pieces, tools) == whole
    for end in range(len(given)):
        cut = parse(fmt, [given[:end]], tools)
        assert parse(fmt, given[:end], tools) == cut
        if not cut.calls:
            assert cut.text == given[:end]  # nothing lost
        for (name, arguments), (whole_name, whole_arguments) in zip(
            cut.calls, whole.calls, strict=False
        ):
            assert name == whole_name
            assert whole_arguments.startswith(arguments)


def splits(fragments):
    """Texts of fragments, cut anywhere: lists of pieces."""
    text = st.lists(st.sampled_from(fragments), max_size=12).map("".join)
    cuts = st.lists(st.integers(0, 200), max_size=12)
    return st.tuples(text, cuts).map(_cut)


def _cut(drawn) -> list[str]:
    text, cuts = drawn
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(borders)]


def check_splits(fmt: ToolFormat, pieces: list[str], tools=TOOLS) -> None:
    text = "".join(pieces)
    whole = parse(fmt, [text], tools)
    assert parse(fmt, pieces, tools) == whole
    if not whole.calls:
        assert whole.text == text


@cache
def tokenizer(special: tuple[str, ...]) -> llguidance.LLTokenizer:
    """Bytes and these special tokens; 256 ends an answer, the special ones follow."""
    whole = json.loads(byte_level_assets(257, (256,)).tokenizer_json)
    for i, text in enumerate(special):
        whole["added_tokens"].append({**whole["added_tokens"][0], "id": 257 + i, "content": text})
    return llguidance.LLTokenizer(json.dumps(whole), eos_token=256)


class Matcher:
    """A grammar at work: whether it lets a text, token by token, be a whole answer."""

    def __init__(self, fmt: ToolFormat, choice=REQUIRED, *, special=(), tools=TOOLS, **options):
        ids = {text: 257 + i for i, text in enumerate(special)}
        wanted = WantedCalls(tools=tools, choice=choice, special=ids, **options)
        grammar = fmt.grammar(wanted)
        assert grammar is not None
        self._tokenizer = tokenizer(tuple(special))
        self._grammar = llguidance.LLMatcher.grammar_from_lark(grammar)
        self._special = special
        is_error, messages = llguidance.LLMatcher.validate_grammar_with_warnings(
            self._grammar, self._tokenizer
        )
        assert not is_error, (messages, grammar)

    def accepts(self, text: str) -> bool:
        return self.reads(text) and self._matcher.is_accepting()

    def reads(self, text: str) -> bool:
        """Whether it may begin so."""
        self._matcher = llguidance.LLMatcher(self._tokenizer, self._grammar)
        bitmask = allocate_token_bitmask(1, self._tokenizer.vocab_size)
        for token in self._tokenizer.tokenize_str(text, parse_special=True):
            fill_next_token_bitmask(self._matcher, bitmask, 0)
            word = int(np.asarray(bitmask)[0, token // 32]) & 0xFFFFFFFF
            if not word >> (token % 32) & 1 or not self._matcher.consume_token(token):
                return False
        assert not self._matcher.is_error(), self._matcher.get_error()
        return True
