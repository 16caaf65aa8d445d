import pytest
from hypothesis import given

from jserve.core.errors import RequestError
from jserve.gateway.tools.format import Tool
from jserve.gateway.tools.gemma import FUNCTION_GEMMA, GEMMA_4
from jserve.gateway.tools.gemma3 import Gemma3
from tests.gateway.tools.calls import AUTO, Matcher, check, check_splits, splits

CALL = ("get_weather", {"city": "Paris"})


@pytest.mark.parametrize(
    ("body", "calls"),
    [
        ("call:get_weather{city:'Paris'}", [CALL]),
        ("call:now{}", [("now", {})]),
        (
            "call:search{query:'a \"b\", \\d\n<c>',page:3}",
            [("search", {"query": 'a "b", \\d\n<c>', "page": 3})],
        ),
        (
            "call:search{tags:['a','b'],filter:{exact:true,weight:-1.5},page:null}",
            [
                (
                    "search",
                    {"tags": ["a", "b"], "filter": {"exact": True, "weight": -1.5}, "page": None},
                )
            ],
        ),
        (
            "call:search{'query':'x', 'a b' : New York}",
            [("search", {"query": "x", "a b": "New York"})],
        ),
        ("call:rm{path:'/'}", None),
        ("call:now", None),
        ("now{}", None),
    ],
)
@pytest.mark.parametrize("fmt", [FUNCTION_GEMMA, GEMMA_4], ids=lambda fmt: fmt.name)
def test_examples_between_tokens(fmt, body, calls):
    whole = fmt.opening + body.replace("'", fmt.quote) + fmt.closing
    if calls is None:
        check(fmt, whole, whole, [])
    else:
        check(fmt, whole, "", calls)
        check(fmt, f"Hm. {whole}{whole}", "Hm.", calls * 2)


@pytest.mark.parametrize(
    ("given_text", "text", "calls"),
    [
        ("[get_weather(city='Paris')]", "", [CALL]),
        ('{"name": "get_weather", "parameters": {"city": "Paris"}}', "", [CALL]),
        ('[{"name": "now", "arguments": {}}]', "", [("now", {})]),
        ("```tool_code\nget_weather(city='Paris')\n```", "", [CALL]),
        (
            "```tool_code\nprint(get_weather(city='Paris'))\nprint(default_api.now())\n```",
            "",
            [CALL, ("now", {})],
        ),
        ("Sure:\n```tool_code\n[now(), now()]\n```\nDone", "Sure:", [("now", {})] * 2),
        ('```json\n{"name": "now", "arguments": {}}\n```', "", [("now", {})]),
        ('```json\n{"a": 1}\n```', '```json\n{"a": 1}\n```', []),
        ("```tool_code\nprint('hi')\n```", "```tool_code\nprint('hi')\n```", []),
        ("```python\nnow()\n```", "```python\nnow()\n```", []),
    ],
)
def test_examples_of_prompted_forms(given_text, text, calls):
    check(Gemma3(), given_text, text + ("\nDone" if given_text.endswith("Done") else ""), calls)


FRAGMENTS = [
    "call:now{",
    "}",
    "a:",
    "<escape>",
    "<esc",
    "1",
    ",",
    "[",
    "]",
    "{",
    "x y",
    "<",
    "\\",
    '"',
    "<end_function_call>",
    "<start_function_call>",
]


@given(splits(FRAGMENTS))
def test_any_split_gives_the_same(pieces):
    check_splits(FUNCTION_GEMMA, ["<start_function_call>call:now{", *pieces])


@given(splits(["```tool_code", "\n", "print(", "now()", ")", "```", "[", "]", "```json", "{", "`"]))
def test_any_split_of_prompted_forms_gives_the_same(pieces):
    check_splits(Gemma3(), pieces)


@pytest.mark.parametrize("fmt", [FUNCTION_GEMMA, GEMMA_4], ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("all_special", [False, True])
def test_grammar(fmt, all_special):
    special = fmt.markers if all_special else ()

    def answer(*bodies):
        return "".join(fmt.opening + body.replace("'", fmt.quote) + fmt.closing for body in bodies)

    matcher = Matcher(fmt, special=special)
    for bodies in (
        ["call:get_weather{city:'Par <is'}"],
        ["call:get_weather{city:'Paris',days:3,unit:'celsius'}", "call:now{}"],
        ["call:search{query:'x',filter:{exact:true},tags:['a','b'],page:null}"],
        ["call:now{any:[1,{thing:'x'}]}"],
    ):
        assert matcher.accepts(answer(*bodies)), bodies
    for body in (
        "call:get_weather{days",
        "call:get_weather{city:P",
        "call:get_weather{city:'P',unit:'k",
    ):
        assert not matcher.reads(answer(body)[: -len(fmt.closing)]), body
    auto = Matcher(fmt, AUTO, special=special)
    assert auto.accepts("Hm.")
    assert auto.accepts("Hm. " + answer("call:get_weather{city:'Paris'}"))
    assert not auto.reads("Hm. " + fmt.opening + "call:get_weather{town")


def test_grammar_follows_references():
    tree = {"type": "object", "properties": {"left": {"$ref": "#/$defs/tree"}}}
    tool = Tool(
        "f", parameters={"properties": {"root": {"$ref": "#/$defs/tree"}}, "$defs": {"tree": tree}}
    )
    matcher = Matcher(GEMMA_4, special=GEMMA_4.markers, tools=(tool,))
    assert matcher.accepts("<|tool_call>call:f{root:{left:{left:{}}}}<tool_call|>")
    assert not matcher.reads("<|tool_call>call:f{root:{right")


def test_refuses_schemas_that_it_cannot_bind():
    for schema, what in [
        ({"type": "string", "minLength": 2}, "minLength"),
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"$ref": "#/$defs/none"}, "none"),
        ({"allOf": []}, "allOf"),
    ]:
        with pytest.raises(RequestError, match=what):
            Matcher(GEMMA_4, tools=(Tool("f", parameters={"properties": {"a": schema}}),))
