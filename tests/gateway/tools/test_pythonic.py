import pytest
from hypothesis import given

from jserve.core.errors import RequestError
from jserve.gateway.tools.format import Tool
from jserve.gateway.tools.pythonic import Pythonic
from tests.gateway.tools.calls import AUTO, SEARCH, Matcher, check, check_splits, splits

CALL = ("get_weather", {"city": "Paris"})


def search(**arguments):
    return ("search", arguments)


@pytest.mark.parametrize(
    ("given_text", "text", "calls"),
    [
        ("[get_weather(city='Paris')]", "", [CALL]),
        ('[get_weather(city="Paris"), now()]', "", [CALL, ("now", {})]),
        ("<|python_start|>[get_weather(city='Paris')]<|python_end|>", "", [CALL]),
        ("Let me see. <|python_start|>[now()]<|python_end|>", "Let me see.", [("now", {})]),
        (
            "[ get_weather( city = 'Paris' , days = 3 , ) , ]",
            "",
            [("get_weather", {"city": "Paris", "days": 3})],
        ),
        (
            "[search(query='x', tags=['a', 'b',], filter={'exact': True, 'weight': -.5})]",
            "",
            [search(query="x", tags=["a", "b"], filter={"exact": True, "weight": -0.5})],
        ),
        (
            "[search(query=None, a=(1, 2), b={}, c=[], d=1_000, e=1e3, f=false, g={1: 'x'})]",
            "",
            [search(query=None, a=[1, 2], b={}, c=[], d=1000, e=1000.0, f=False, g={"1": "x"})],
        ),
        (
            "[search(query='it\\'s \"so\"\\n\\x41\\u00e9\\U0001F600\\101\\d')]",
            "",
            [search(query='it\'s "so"\nAé😀A\\d')],
        ),
        ("[search(query='\\ud83d\\ude00')]", "", [search(query="😀")]),
        (
            '[search(query="""a "b"\nc""", a=\'\', b="")]',
            "",
            [search(query='a "b"\nc', a="", b="")],
        ),
        ("[now()", "", [("now", {})]),
        ("[now()] and more", " and more", [("now", {})]),
        # No calls
        ("[now]", "[now]", []),
        ("[1, 2]", "[1, 2]", []),
        ("[rm(path='/')]", "[rm(path='/')]", []),
        ("[get_weather('Paris')]", "[get_weather('Paris')]", []),
        ("now()", "now()", []),
        ("See [now()]", "See [now()]", []),
        ("[now(), rm()]", ", rm()]", [("now", {})]),
    ],
)
def test_examples(given_text, text, calls):
    check(Pythonic(), given_text, text, calls)


FRAGMENTS = [
    "[",
    "now(",
    ")",
    "]",
    ", ",
    "a=",
    "b=",
    "'",
    '"',
    '"""',
    "\\",
    "\\u00",
    "e9",
    "x",
    "1",
    "-",
    ".5",
    "None",
    "Tru",
    "e",
    "{",
    "}",
    ":",
    "(",
    "<|python_start|>",
    "<|python_end|>",
    "\n",
]


@given(splits(FRAGMENTS))
def test_any_split_gives_the_same(pieces):
    check_splits(Pythonic(), ["[now(a=", *pieces])


@given(splits(FRAGMENTS))
def test_any_split_of_any_text_gives_the_same(pieces):
    check_splits(Pythonic(), pieces)


@pytest.mark.parametrize("special", [(), ("<|python_start|>", "<|python_end|>")])
def test_grammar(special):
    matcher = Matcher(Pythonic(), special=special)
    for text in (
        '[get_weather(city="Paris")]',
        '[get_weather(city="Paris", unit="celsius")]',
        '[now(), get_weather(city="Paris", days=3), search(query="x", filter={"exact":true})]',
    ):
        assert matcher.accepts(text), text
    assert not matcher.reads("[get_weather(days")
    assert not matcher.reads('[get_weather(city="Paris", days="')
    auto = Matcher(Pythonic(), AUTO, special=special)
    for text in ("Hi [now]", "", '[search(anything=[1], more="x")]'):
        assert auto.accepts(text), text
    assert not auto.reads("[get_weather(town")


def test_refuses_schemas_that_it_cannot_bind():
    tool = Tool("f", parameters={"type": "object", "properties": {"a-b": {}}})
    with pytest.raises(RequestError, match="a-b"):
        Matcher(Pythonic(), tools=(tool,))
    tool = Tool("f", parameters={"anyOf": [SEARCH.parameters]})
    with pytest.raises(RequestError, match="anyOf"):
        Matcher(Pythonic(), tools=(tool,))
