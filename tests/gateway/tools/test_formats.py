import contextlib
import json

import pytest

from jserve.core.errors import ConfigError, RequestError
from jserve.gateway.tools.format import ChoiceMode, Tool, ToolChoice, WantedCalls
from jserve.gateway.tools.formats import FORMATS, detect_format, named_format
from tests.gateway.tools.calls import AUTO, REQUIRED, SEARCH, TOOLS, Matcher

TAKES_TOOLS = "{% if tools %}{{ tools | tojson }}{% endif %} "


@pytest.mark.parametrize(
    ("says", "name"),
    [
        # What tells the models' own templates apart: Qwen 2.5 and 3, Hermes, SmolLM3
        (
            '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>',
            "hermes",
        ),
        ("<tool_call>\n<function=example>\n<parameter=a>", "qwen3_coder"),
        # Llama 3.1, 3.2 and 4
        ('{"name": function name, "parameters": dictionary} <|python_tag|>', "llama3_json"),
        ('<|python_start|> {"name": function name, "parameters": dictionary}', "llama3_json"),
        ("[func_name1(params_name1=params_value1), func_name2()]", "pythonic"),
        ("[AVAILABLE_TOOLS] [TOOL_CALLS]", "mistral"),
        ("<|tool_call>call:", "gemma4"),
        ("<start_function_call>call:", "functiongemma"),
        ("```tool_code", "gemma3"),
        ("<|channel|>commentary to=functions.", "harmony"),
        # Formats not known here: DeepSeek, GLM
        ("<｜tool▁calls▁begin｜>", None),
        ("<tool_call>f<arg_key>a</arg_key>", None),
        ("Answer with JSON.", "generic_json"),
    ],
)
def test_detects_what_a_template_asks_for(says, name):
    found = detect_format(TAKES_TOOLS + says)
    assert (None if found is None else found.name) == name


def test_a_template_without_tools_has_none():
    assert detect_format(None) is None
    assert detect_format("{{ messages }} <tool_call>") is None
    assert detect_format("{{ bos }} You have no tools. {{ messages }} <tool_call>") is None
    assert detect_format("{%- if xml_tools or x -%} <tool_call>") is FORMATS["hermes"]


def test_names_and_aliases():
    for name in FORMATS:
        assert named_format(name).name == name
    assert named_format("qwen3_xml").name == "qwen3_coder"
    assert named_format("llama4_pythonic").name == "pythonic"
    with pytest.raises(ConfigError, match="hermes"):
        named_format("herms")


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda fmt: fmt.name)
def test_when_any_text_will_do(fmt):
    assert fmt.grammar(WantedCalls(tools=(SEARCH,), choice=AUTO)) is None
    assert fmt.grammar(WantedCalls(tools=TOOLS, choice=ToolChoice(ChoiceMode.NONE))) is None
    with pytest.raises(RequestError, match="rm"):
        fmt.grammar(WantedCalls(tools=TOOLS, choice=ToolChoice(ChoiceMode.NAMED, "rm")))
    with pytest.raises(RequestError, match="a call"):
        fmt.grammar(WantedCalls(tools=(), choice=REQUIRED))


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda fmt: fmt.name)
def test_a_named_tool_is_called_once(fmt):
    choice = ToolChoice(ChoiceMode.NAMED, "search")
    grammar = fmt.grammar(WantedCalls(tools=TOOLS, choice=choice))
    assert "search" in grammar
    assert "get_weather" not in grammar
    alone = fmt.grammar(WantedCalls(tools=(SEARCH,), choice=REQUIRED, parallel=False))
    assert grammar == alone


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda fmt: fmt.name)
def test_ids_differ(fmt):
    assert len({fmt.call_id() for _ in range(20)}) == 20


def test_schemas_may_be_replaced():
    """So that a request can ask for its own white space."""
    wanted = WantedCalls(
        tools=(Tool("f"),),
        choice=REQUIRED,
        argument_schema=lambda tool: {
            "type": "object",
            "x-guidance": {"whitespace_flexible": False},
        },
    )
    assert "whitespace_flexible" in FORMATS["hermes"].grammar(wanted)


BAD_SCHEMAS = [
    {"type": "object", "properties": 3},
    {"type": "object", "properties": {"a": 3}},
    {"type": "object", "required": [[]]},
    {"type": "object", "required": ["missing"]},
    {"type": "object", "properties": {"a": {"enum": []}}},
    {"type": "object", "properties": {"a": {"type": [3]}}},
    {"type": "object", "properties": {"a": {"anyOf": [3]}}},
    {"type": "object", "properties": {"a": {"$ref": []}}},
    {"type": ["object"], "patternProperties": {}},
]


@pytest.mark.parametrize("schema", BAD_SCHEMAS)
@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda fmt: fmt.name)
def test_bad_schemas_are_refused_or_left_to_llguidance(fmt, schema):
    with contextlib.suppress(RequestError):
        fmt.grammar(WantedCalls(tools=(Tool("f", parameters=schema),), choice=REQUIRED))


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda fmt: fmt.name)
def test_nesting_without_end_is_refused(fmt):
    schema: dict = {}
    for _ in range(3000):
        schema = {"type": "array", "items": schema}
    tool = Tool("f", parameters={"properties": {"a": schema}})
    with pytest.raises(RequestError, match="deeply"):
        fmt.grammar(WantedCalls(tools=(tool,), choice=REQUIRED))


@pytest.mark.parametrize("name", ['qu"ote', "back\\slash", "naïve 工具", "/x/", "a'b"])
def test_names_that_need_escapes_in_a_grammar(name):
    tools = (Tool(name),)
    call = json.dumps({"name": name, "arguments": {}}, ensure_ascii=False)
    matcher = Matcher(FORMATS["hermes"], tools=tools)
    assert matcher.accepts(f"<tool_call>\n{call}\n</tool_call>")
    assert not matcher.reads(f"<tool_call>\n{call[:10]}x")
