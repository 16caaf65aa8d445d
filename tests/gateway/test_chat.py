"""Chat templates: the means of Hugging Face's environment, and refusals of the sandbox."""

import datetime
import json
from pathlib import Path

import pytest

from jserve.core.errors import ConfigError, RequestError
from jserve.gateway.chat import ChatTemplate
from jserve.gateway.messages import check_messages

HI = [{"role": "user", "content": "Hi <b>&"}]


def render(source, messages=HI, **options):
    template = ChatTemplate(source, special_tokens={"bos_token": "<s>", "eos_token": "</s>"})
    return template.render(messages, **options)


REFERENCE = json.loads(
    (Path(__file__).parents[1] / "fixtures/templates/chat_templates.json").read_text()
)


@pytest.mark.parametrize("name", REFERENCE["templates"])
def test_templates_render_as_in_transformers(name):
    spec = REFERENCE["templates"][name]
    tokens = {key: value for key, value in spec.items() if key != "source"}
    template = ChatTemplate(spec["source"], special_tokens=tokens)
    cases = [case for case in REFERENCE["cases"] if case["template"] == name]
    assert len(cases) > 10
    for case in cases:
        options = {"add_generation_prompt": case["add_generation_prompt"]}
        if "rendered" in case:
            assert template.render(case["messages"], **options) == case["rendered"]
        else:
            with pytest.raises(RequestError) as caught:
                template.render(case["messages"], **options)
            assert case["error"] in str(caught.value)


def test_chatml_as_smollm_has_it():
    source = (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
        "{{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}"
        "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    system = "<|im_start|>system\nYou are helpful<|im_end|>\n"
    user = "<|im_start|>user\nHi <b>&<|im_end|>\n"
    assert render(source) == system + user + "<|im_start|>assistant\n"
    assert render(source, add_generation_prompt=False) == system + user


def test_the_environment_is_hugging_faces():
    # Blocks are trimmed, loop controls work, tojson escapes nothing, tools are None.
    source = (
        "{{ bos_token }}\n"
        "{% for m in messages %}\n"
        "    {% if loop.index > 1 %}\n"
        "        {% break %}\n"
        "    {% endif %}\n"
        "{{ m | tojson }}\n"
        "{% endfor %}\n"
        "{% generation %}x{% endgeneration %}"
        "{{ tools is none }}{{ [1, 2] | tojson(indent=1) }}"
    )
    json = '{"role": "user", "content": "Hi <b>&"}'
    assert render(source, HI * 2) == f"<s>\n{json}\nxTrue[\n 1,\n 2\n]"
    assert render("{{ strftime_now('%Y') }}") == str(datetime.datetime.now().year)


def test_a_template_that_raises_is_the_clients_error():
    with pytest.raises(RequestError, match="roles must alternate") as caught:
        render("{{ raise_exception('roles must alternate') }}")
    assert caught.value.param == "messages"
    for source in (
        "{{ messages[9].content }}",
        "{{ messages.x.y }}",
        "{{ 1 / 0 }}",
        "{{ 'a' + 1 }}",
        "{{ undefined_function() }}",
        "{{ none + 1 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ):
        with pytest.raises(RequestError, match="chat template refused"):
            render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__.x }}",
        "{{ 'x' * 10**9 }}",
        "{{ 9**999999999 }}",
        "{{ 2 ** (10**9) }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{% for i in range(99999) %}{{ 'x' * 999 }}{% endfor %}",
    ],
)
def test_the_sandbox_bounds_what_a_template_can_do(source):
    with pytest.raises(RequestError, match="chat template"):
        render(source)


def test_a_broken_template_is_a_config_error():
    with pytest.raises(ConfigError, match="line 2"):
        ChatTemplate("x\n{% if %}", special_tokens={})


def test_messages_are_checked_and_parts_joined():
    checked = check_messages(
        [
            {"role": "system", "content": "S", "name": None},
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            },
        ],
        max_messages=2,
    )
    assert checked == [{"role": "system", "content": "S"}, {"role": "user", "content": "a\nb"}]


BAD_MESSAGES = {
    "messages": [None, [], {}, "x", [{"role": "user", "content": "x"}] * 3],
    "messages[0]": [["x"], [None]],
    "messages[0].role": [[{"content": "x"}], [{"role": 1, "content": "x"}]],
    "messages[0].content": [[{"role": "user"}], [{"role": "user", "content": 3}]],
    "messages[0].content[0]": [
        [{"role": "user", "content": [{"type": "image_url"}]}],
        [{"role": "user", "content": ["x"]}],
    ],
    "messages[0].content[0].text": [[{"role": "user", "content": [{"type": "text", "text": 1}]}]],
    "messages[0].tool_calls": [
        [{"role": "assistant", "content": "x", "tool_calls": "f"}],
        [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}] * 257}],
        [{"role": "user", "content": "x", "tool_calls": [{"function": {"name": "f"}}]}],
    ],
    "messages[0].tool_calls[0]": [
        [{"role": "assistant", "content": "x", "tool_calls": [call]}]
        for call in ("f", {"type": "function"}, {"function": {}}, {"function": {"name": 1}})
    ],
    "messages[0].tool_calls[0].id": [
        [{"role": "assistant", "tool_calls": [{"id": 1, "function": {"name": "f"}}]}]
    ],
    "messages[0].tool_calls[0].function.arguments": [
        [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": it}}]}]
        for it in ("{", "[1]", "1", "NaN", '{"x": NaN}', "{'x': 1}", [1], 5, "[" * 100_000)
    ],
    "messages[0].function_call": [
        [{"role": "assistant", "content": "x", "function_call": call}]
        for call in ("f", {"arguments": "{}"})
    ],
    "messages[0].tool_call_id": [[{"role": "tool", "content": "x", "tool_call_id": 1}]],
    "messages[0].audio": [[{"role": "assistant", "content": "x", "audio": {"id": "a"}}]],
    "messages[0].mood": [[{"role": "user", "content": "x", "mood": "good"}]],
    "messages[0].reasoning_content": [
        [{"role": "assistant", "content": "x", "reasoning_content": 5}]
    ],
}


@pytest.mark.parametrize("param", BAD_MESSAGES)
def test_bad_messages_are_named(param):
    for messages in BAD_MESSAGES[param]:
        with pytest.raises(RequestError) as caught:
            check_messages(messages, max_messages=2)
        assert caught.value.param == param


CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


@pytest.mark.parametrize(
    ("message", "read"),
    [
        (
            {"content": None, "tool_calls": [{"id": "a", "type": "function", "function": it}]},
            {"content": "", "tool_calls": [{"id": "a", **CALL}]},
        )
        for it in (
            {"name": "f", "arguments": '{"x": 1}'},
            {"name": "f", "arguments": {"x": 1}},
            {"name": "f", "arguments": ' {"x":1}\n', "parsed_arguments": {"x": 1}},
        )
    ]
    + [
        (
            {"tool_calls": [{"index": 0, **CALL}, CALL], "content": "Let me look."},
            {"content": "Let me look.", "tool_calls": [CALL, CALL]},
        ),
        (
            {"content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}},
            {"content": "", "tool_calls": [CALL]},
        ),
        (
            {"content": "", "tool_calls": [{"function": {"name": "f", "arguments": ""}}]},
            {
                "content": "",
                "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}],
            },
        ),
    ],
)
def test_replayed_calls_have_the_form_that_templates_read(message, read):
    checked = check_messages([{"role": "assistant", **message}], max_messages=1)
    assert checked == [{"role": "assistant", **read}]


@pytest.mark.parametrize(
    ("message", "read"),
    [
        (
            {"role": "tool", "tool_call_id": "a", "content": "x"},
            {"role": "tool", "tool_call_id": "a", "content": "x"},
        ),
        (
            {"role": "tool", "content": [{"type": "text", "text": "x"}], "name": "f"},
            {"role": "tool", "content": "x", "name": "f"},
        ),
        ({"role": "tool", "content": None}, {"role": "tool", "content": ""}),
        (
            {"role": "function", "name": "f", "content": "x"},
            {"role": "tool", "name": "f", "content": "x"},
        ),
    ],
)
def test_answers_of_tools(message, read):
    assert check_messages([message], max_messages=1) == [read]


@pytest.mark.parametrize(
    ("message", "text"),
    [
        # As the clients of OpenAI, LiteLLM and others send an answer back.
        ({"content": "", "refusal": None}, ""),
        ({"content": None}, ""),
        ({}, ""),
        ({"content": None, "refusal": "I won't."}, "I won't."),
        ({"content": "x", "refusal": ""}, "x"),
        ({"content": "x", "annotations": [], "audio": None, "tool_calls": [], "parsed": None}, "x"),
        ({"content": "x", "annotations": [{"type": "url_citation"}], "id": "msg_1"}, "x"),
        ({"content": "x", "function_call": None, "provider_specific_fields": {"a": 1}}, "x"),
        ({"content": "x", "reasoning_content": None, "name": None, "unheard_of": {}}, "x"),
        ({"content": [{"type": "text", "text": "x", "annotations": []}]}, "x"),
        ({"content": [{"type": "output_text", "text": "x", "logprobs": []}]}, "x"),
        ({"content": [{"type": "refusal", "refusal": "No."}]}, "No."),
        ({"content": []}, ""),
    ],
)
def test_a_replayed_answer_is_its_text(message, text):
    checked = check_messages([{"role": "assistant", **message}], max_messages=1)
    assert checked == [{"role": "assistant", "content": text}]


def test_reasoning_is_for_the_template():
    source = "{% for m in messages %}<{{ m.reasoning_content }}>{{ m.content }}{% endfor %}"
    message = {"role": "assistant", "content": "x", "reasoning_content": "hm"}
    assert render(source, check_messages([message], max_messages=1)) == "<hm>x"


def test_unknown_fields_of_messages_can_be_ignored():
    ignored: list[str] = []
    messages = [{"role": "user", "content": "x", "mood": "good", "tone": 1}]
    checked = check_messages(messages, max_messages=1, ignored=ignored)
    assert checked == [{"role": "user", "content": "x"}]
    assert ignored == ["messages[0].mood", "messages[0].tone"]
    with pytest.raises(RequestError, match="audio is not supported"):  # it would be missing
        check_messages(
            [{"role": "assistant", "content": "x", "audio": {"id": "a"}}],
            max_messages=1,
            ignored=ignored,
        )
