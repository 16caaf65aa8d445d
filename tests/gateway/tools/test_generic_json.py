import pytest
from hypothesis import given

from jserve.gateway.tools.generic_json import GenericJson
from tests.gateway.tools.calls import AUTO, Matcher, check, check_splits, splits

PARIS = '{"name": "get_weather", "arguments": {"city": "Paris"}}'
CALL = ("get_weather", {"city": "Paris"})


@pytest.mark.parametrize(
    ("given_text", "text", "calls"),
    [
        (PARIS, "", [CALL]),
        (f" {PARIS} ", "", [CALL]),
        (f"[{PARIS}]", "", [CALL]),
        (f"[\n  {PARIS},\n  {PARIS}\n]", "", [CALL] * 2),
        ('{"parameters": {"query": "x"}, "name": "search"}', "", [("search", {"query": "x"})]),
        (f"[{PARIS}", "", [CALL]),
        (f"See {PARIS}", f"See {PARIS}", []),
        ("[1, 2]", "[1, 2]", []),
        ('{"name": "Ann", "arguments": {}}', '{"name": "Ann", "arguments": {}}', []),
        ('[{"name": "now", "arguments": {}}, 2]', ", 2]", [("now", {})]),
    ],
)
def test_examples(given_text, text, calls):
    check(GenericJson(), given_text, text, calls)


def test_without_tools_all_is_text():
    check(GenericJson(), PARIS, PARIS, [], tools=())


@given(splits([PARIS, " ", "{", "}", "[", "]", ",", "x", '"name"', ":", '"now"']))
def test_any_split_gives_the_same(pieces):
    check_splits(GenericJson(), pieces)


def test_grammar():
    several = Matcher(GenericJson())
    assert several.accepts(f"[{PARIS}, {PARIS}]")
    assert not several.reads("{")
    one = Matcher(GenericJson(), parallel=False)
    assert one.accepts(PARIS)
    assert not one.reads(PARIS.replace('"Paris"', "1"))
    auto = Matcher(GenericJson(), AUTO, parallel=False)
    assert auto.accepts("No [1]")
    assert auto.accepts(PARIS)
    assert not auto.reads('{"a')
