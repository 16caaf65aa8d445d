"""What a grammar lets through is read back as calls that satisfy the schema."""

import json
import random

import llguidance
import pytest
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from jserve.gateway.tools.format import WantedCalls
from jserve.gateway.tools.formats import FORMATS
from tests.gateway.tools.calls import REQUIRED, TOOLS, parse, tokenizer

END = 256
OTHER_SPECIAL = ("<|start|>", "<|end|>")
ENDINGS = ["\n</parameter>\n", "<escape>", '<|"|>', "<|end|>", "<|message|>"]


def sample(grammar: str, special: tuple[str, ...], rng: random.Random) -> str | None:
    """Returns a random answer, or None if it does not end in time."""
    lltokenizer = tokenizer(special)
    matcher = llguidance.LLMatcher(lltokenizer, llguidance.LLMatcher.grammar_from_lark(grammar))
    bitmask = allocate_token_bitmask(1, lltokenizer.vocab_size)
    tokens: list[int] = []
    endings = [lltokenizer.tokenize_str(text, parse_special=True) for text in ENDINGS]
    while len(tokens) < 800:
        # Random text hits upon no marker.
        ending = rng.choice(endings)
        if rng.random() < 0.2 and matcher.validate_tokens(ending) == len(ending):
            matcher.consume_tokens(ending)
            tokens += ending
            continue
        fill_next_token_bitmask(matcher, bitmask, 0)
        words = bitmask[0].astype("uint32")
        allowed = [i for i in range(lltokenizer.vocab_size) if words[i // 32] >> (i % 32) & 1]
        # Nor does it end soon; what closes something is favoured.
        closing = [i for i in allowed if i >= END or chr(i) in "\"'}])<\n"]
        token = rng.choice(closing if closing and rng.random() < 0.3 else allowed)
        if token == END:
            return lltokenizer.decode_str(tokens)
        assert matcher.consume_token(token)
        tokens.append(token)
        if matcher.is_stopped():
            return lltokenizer.decode_str(tokens)
    return None


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda fmt: fmt.name)
def test_answers_are_read_back(fmt, marked):
    special = (*fmt.markers, *OTHER_SPECIAL) if marked else ()
    if fmt.name == "harmony" and not marked:
        pytest.skip("its messages end where special tokens are")
    ids = {text: 257 + i for i, text in enumerate(special)}
    grammar = fmt.grammar(WantedCalls(tools=TOOLS, choice=REQUIRED, special=ids))
    rng = random.Random(f"{fmt.name} {marked}")
    num_read = 0
    for _ in range(8):
        text = sample(grammar, special, rng)
        if text is None:
            continue
        answer = parse(fmt, [text])
        assert answer.calls, text
        assert answer.text == "" or fmt.name == "harmony", text
        for name, arguments in answer.calls:
            check_arguments(name, json.loads(arguments))
        num_read += 1
    assert num_read >= 3


def check_arguments(name: str, arguments: dict) -> None:
    if name == "get_weather":
        assert isinstance(arguments.pop("city"), str)
        assert isinstance(arguments.pop("days", 0), int)
        assert arguments.pop("unit", "celsius") in ("celsius", "fahrenheit")
        assert not arguments
    elif name == "search":
        assert isinstance(arguments.pop("query"), str)
        assert isinstance(arguments.pop("filter", {"exact": True})["exact"], bool)
        assert all(isinstance(tag, str) for tag in arguments.pop("tags", []))
        assert isinstance(arguments.pop("page", None), int | None)
        assert not arguments
