import pytest
from hypothesis import given

from jserve.gateway.tools.mistral import Mistral
from tests.gateway.tools.calls import AUTO, Matcher, check, check_splits, splits

PARIS = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
NAMED = '[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}'
CALL = ("get_weather", {"city": "Paris"})


@pytest.mark.parametrize(
    ("given_text", "text", "calls"),
    [
        (f"[TOOL_CALLS][{PARIS}]", "", [CALL]),
        (f"[TOOL_CALLS] [{PARIS}, {PARIS}]", "", [CALL] * 2),
        (f"Sure. [TOOL_CALLS] [{PARIS}]", "Sure.", [CALL]),
        (f'[TOOL_CALLS][{PARIS[:-1]}, "id": "D681PevKs"}}]', "", [CALL]),
        (f"[TOOL_CALLS]{PARIS}", "", [CALL]),
        (NAMED, "", [CALL]),
        (f"{NAMED}{NAMED}", "", [CALL] * 2),
        ('[TOOL_CALLS]get_weather[CALL_ID]D681PevKs[ARGS]{"city": "Paris"}', "", [CALL]),
        ('[TOOL_CALLS]get_weather{"city": "Paris"}', "", [CALL]),
        ('[TOOL_CALLS]rm[ARGS]{"path": "/"}', '[TOOL_CALLS]rm[ARGS]{"path": "/"}', []),
        ("[TOOL_CALLS]now[ARGS]?", "[TOOL_CALLS]now[ARGS]?", []),
        ("[TOOL_CALLS] later", "[TOOL_CALLS] later", []),
        ("an [ARGS] alone", "an [ARGS] alone", []),
    ],
)
def test_examples(given_text, text, calls):
    check(Mistral(), given_text, text, calls)


@given(
    splits([PARIS, NAMED, "[TOOL_CALLS]", "[", "]", ",", " ", "now", "[ARGS]", "{}", "[CALL_ID]"])
)
def test_any_split_gives_the_same(pieces):
    check_splits(Mistral(), pieces)


def test_ids_are_nine_letters_and_digits():
    ids = {Mistral().call_id() for _ in range(50)}
    assert len(ids) == 50
    assert all(len(one) == 9 and one.isalnum() and one.isascii() for one in ids)


@pytest.mark.parametrize(
    ("special", "answer", "two"),
    [
        ((), f"[TOOL_CALLS][{PARIS}]", f"[TOOL_CALLS][{PARIS}, {PARIS}]"),
        (("[TOOL_CALLS]",), f"[TOOL_CALLS][{PARIS}]", f"[TOOL_CALLS][{PARIS}, {PARIS}]"),
        (("[TOOL_CALLS]", "[ARGS]"), NAMED, NAMED * 2),
    ],
)
def test_grammar(special, answer, two):
    matcher = Matcher(Mistral(), special=special)
    assert matcher.accepts(answer)
    assert matcher.accepts(two)
    assert not matcher.reads(answer.replace("Paris", 'Paris", "x": "'))
    auto = Matcher(Mistral(), AUTO, special=special)
    assert auto.accepts("[1]")
    assert auto.accepts(f"Sure. {two}")
    assert not auto.reads("Sure. [TOOL_CALLS]x")
