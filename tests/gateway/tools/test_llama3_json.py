import pytest
from hypothesis import given

from jserve.gateway.tools.llama3_json import Llama3Json
from tests.gateway.tools.calls import AUTO, Matcher, check, check_splits, splits

PARIS = '{"name": "get_weather", "parameters": {"city": "Paris"}}'
CALL = ("get_weather", {"city": "Paris"})


@pytest.mark.parametrize(
    ("given_text", "text", "calls"),
    [
        (PARIS, "", [CALL]),
        (f"\n\n{PARIS}\n", "", [CALL]),
        (f"<|python_tag|>{PARIS}", "", [CALL]),
        (f"{PARIS}; {PARIS}", "", [CALL] * 2),
        (f"{PARIS};{PARIS};\n{PARIS}", "", [CALL] * 3),
        (f"<|python_tag|>{PARIS}; {PARIS}", "", [CALL] * 2),
        (f"[{PARIS}, {PARIS}]", "", [CALL] * 2),
        (f"<|python_start|>{PARIS}<|python_end|>", "", [CALL]),
        (f"I'll look. <|python_tag|>{PARIS}", "I'll look.", [CALL]),
        ('{"type": "function", "name": "now", "parameters": {}}', "", [("now", {})]),
        (f"{PARIS} That is all; thanks", " That is all; thanks", [CALL]),
        (f'{PARIS}; {{"name": "rm"}}', '; {"name": "rm"}', [CALL]),
        # No calls
        (f"I'd call {PARIS}", f"I'd call {PARIS}", []),
        ('{"answer": [1, 2]}', '{"answer": [1, 2]}', []),
        (
            "<|python_tag|>brave_search.call(query=1)",
            "<|python_tag|>brave_search.call(query=1)",
            [],
        ),
        ("{", "{", []),
    ],
)
def test_examples(given_text, text, calls):
    check(Llama3Json(), given_text, text, calls)


@given(splits([PARIS, ";", " ", "{", "}", "<|python_tag|>", "<|python", "[", "]", ",", "x", '"']))
def test_any_split_gives_the_same(pieces):
    check_splits(Llama3Json(), pieces)


@pytest.mark.parametrize("special", [(), ("<|python_tag|>",)])
def test_grammar(special):
    matcher = Matcher(Llama3Json(), special=special)
    assert matcher.accepts(PARIS)
    assert matcher.accepts(f"{PARIS}; {PARIS}")
    assert matcher.accepts(f"<|python_tag|>{PARIS}") == bool(special)
    assert not matcher.reads(PARIS.replace("city", "town"))
    auto = Matcher(Llama3Json(), AUTO, special=special, parallel=False)
    for text in ("", "Hi { there", PARIS):
        assert auto.accepts(text), text
    assert not auto.reads(f"{PARIS};")
    assert not auto.reads('{"name": "get_weather", "parameters": {"town"')
    assert not auto.reads(" {")
