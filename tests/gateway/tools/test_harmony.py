import pytest
from hypothesis import given

from jserve.gateway.tools.harmony import Harmony
from tests.gateway.tools.calls import AUTO, Matcher, check, check_splits, splits

OPENING = "<|channel|>commentary to=functions."
PARIS = f'{OPENING}get_weather <|constrain|>json<|message|>{{"city": "Paris"}}<|call|>'
CALL = ("get_weather", {"city": "Paris"})
SPECIAL = ("<|channel|>", "<|message|>", "<|constrain|>", "<|call|>", "<|start|>", "<|end|>")


@pytest.mark.parametrize(
    ("given_text", "text", "calls"),
    [
        (PARIS, "", [CALL]),
        (f"Let me look.{PARIS}", "Let me look.", [CALL]),
        (f'{OPENING}get_weather json<|message|>{{"city": "Paris"}}', "", [CALL]),
        (f"{OPENING}now<|message|>{{}}<|call|>", "", [("now", {})]),
        (f"{OPENING}rm<|message|>{{}}<|call|>", f"{OPENING}rm<|message|>{{}}<|call|>", []),
        (f"{OPENING}now<|message|>?", f"{OPENING}now<|message|>?", []),
    ],
)
def test_examples(given_text, text, calls):
    check(Harmony(), given_text, text, calls)


@given(splits([*SPECIAL, OPENING, "now", "json", " ", "{}", '{"a": ', "to=", "commentary"]))
def test_any_split_gives_the_same(pieces):
    check_splits(Harmony(), pieces)


def test_grammar():
    thought = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
    call = PARIS.removesuffix("<|call|>")
    required = Matcher(Harmony(), special=SPECIAL)
    assert required.accepts(call)
    assert required.accepts(f"{thought}{thought}{call}")
    assert not required.reads(f"{thought}<|channel|>f")
    assert not required.reads(call.replace("city", "town"))
    auto = Matcher(Harmony(), AUTO, special=SPECIAL)
    assert auto.accepts(f"{thought}<|channel|>final<|message|>Hi")
    assert auto.accepts(f"{thought}{call}")
    assert not auto.reads(call.replace("city", "town"))
