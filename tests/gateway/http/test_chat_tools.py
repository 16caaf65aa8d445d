"""Chats with tools, reasoning, prefills and documents, by the official client and a script."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import pytest
from pydantic import BaseModel

from jserve.core.request import ConstraintSpec, Request
from jserve.gateway.bad_words import bad_sequences
from tests.gateway.http.http_serving import (
    CHAT,
    CHAT_TEMPLATE,
    END,
    MODEL,
    Served,
    error_of,
    serving,
)

HI: list[Any] = [{"role": "user", "content": "Hi"}]
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER: Any = {
    "type": "function",
    "function": {"name": "weather", "description": "By city.", "parameters": PARAMETERS},
}
NAMED: Any = {"type": "function", "function": {"name": "weather"}}
ARGUMENTS = {"city": "Köln"}
# Takes tools, and the calls and answers that come back.
WITH_TOOLS = (
    "{% if tools %}tools: {{ tools | tojson }}\n{% endif %}{% for m in messages %}{{ m.role }}: "
    "{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>{{ c.function | tojson }}"
    "</tool_call>{% endfor %}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
THINKING = CHAT_TEMPLATE + "{# <think> #}"
OPENED = CHAT_TEMPLATE + "<think>\n"
# What models of each format write for a call of WEATHER.
WRITTEN = {
    "hermes": '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>',
    "generic_json": '{"name": "weather", "arguments": {"city": "Köln"}}',
    "llama3_json": '{"name": "weather", "parameters": {"city": "Köln"}}',
    "pythonic": '[weather(city="Köln")]',
    "mistral": '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Köln"}}]',
}


class Script:
    """An engine's answers; a test sets the text of the next ones."""

    text = "ok"

    def __call__(self, request: Request) -> list[int]:
        return [*self.text.encode(), END]


@contextmanager
def chatting(text: str, **options: Any) -> Iterator[tuple[openai.OpenAI, Served]]:
    script = Script()
    script.text = text
    with (
        serving(reply=script, **options) as served,
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0) as client,
    ):
        yield client, served


def create(client: openai.OpenAI, **fields: Any) -> Any:
    return client.chat.completions.create(model="", messages=HI, **fields)


def post(served: Served, **fields: Any) -> httpx.Response:
    return httpx.post(served.url + CHAT, json={"messages": HI, **fields}, timeout=60)


def prompt_of(served: Served) -> str:
    return bytes(served.engine.submitted[-1].prompt).decode()


def grammar_of(served: Served) -> str:
    constraint = served.engine.submitted[-1].constraint
    return "" if constraint is None else constraint.grammar


@pytest.mark.parametrize("parser", WRITTEN)
@pytest.mark.parametrize("template", [CHAT_TEMPLATE, WITH_TOOLS], ids=["plain", "with tools"])
def test_calls_of_every_format(parser: str, template: str) -> None:
    options = {"tool_parser": parser, "chat_template": template}
    with chatting(WRITTEN[parser], **options) as (client, served):
        answer = create(client, tools=[WEATHER])
        assert '"name": "weather"' in prompt_of(served)
        choice = answer.choices[0]
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        (call,) = choice.message.tool_calls
        assert (call.type, call.function.name) == ("function", "weather")
        assert json.loads(call.function.arguments) == ARGUMENTS
        chunks = list(create(client, tools=[WEATHER], stream=True))
        deltas = [call for it in chunks for call in it.choices[0].delta.tool_calls or ()]
        assert {delta.index for delta in deltas} == {0}
        assert [delta.function.name for delta in deltas if delta.id] == ["weather"]
        joined = "".join(delta.function.arguments for delta in deltas)
        assert json.loads(joined) == ARGUMENTS
        assert len(deltas) > 2  # the arguments came piece by piece
        assert [it.choices[0].finish_reason for it in chunks if it.choices[0].finish_reason] == [
            "tool_calls"
        ]
        assert not any(it.choices[0].delta.content for it in chunks)


def test_the_choice_of_tools() -> None:
    with chatting(WRITTEN["hermes"], chat_template=WITH_TOOLS, tool_parser="hermes") as (
        client,
        served,
    ):
        for choice, reason in (("auto", "tool_calls"), ("required", "tool_calls"), (NAMED, "stop")):
            answer = create(client, tools=[WEATHER], tool_choice=choice)
            assert answer.choices[0].finish_reason == reason
            assert len(answer.choices[0].message.tool_calls) == 1
            assert ("weather" in grammar_of(served)) is (choice != "auto")
        strict = {"type": "function", "function": {**WEATHER["function"], "strict": True}}
        create(client, tools=[strict])
        assert "city" in grammar_of(served)
        answer = create(client, tools=[WEATHER], tool_choice="none")
        assert answer.choices[0].message.content == WRITTEN["hermes"]
        assert "weather" not in prompt_of(served)
        assert grammar_of(served) == ""
        both = create(client, tools=[WEATHER], n=2, logprobs=True, top_logprobs=1)
        first, second = both.choices
        assert first.message.tool_calls[0].id != second.message.tool_calls[0].id
        assert len(first.logprobs.content) == len(WRITTEN["hermes"].encode()) + 1
        stopped = create(client, tools=[WEATHER], stop=["</tool_call>"])
        assert stopped.choices[0].finish_reason == "tool_calls"


def test_a_schema_beside_tools_is_an_alternative() -> None:
    class Answer(BaseModel):
        degrees: int

    options = {"chat_template": WITH_TOOLS, "tool_parser": "hermes"}
    with chatting('{"degrees": 5}', **options) as (client, served):
        strict = {**WEATHER["function"], "strict": True}
        strict["parameters"] = {**PARAMETERS, "additionalProperties": False}
        answer = client.chat.completions.parse(
            model="",
            messages=HI,
            response_format=Answer,
            tools=[{"type": "function", "function": strict}],
        )
        assert answer.choices[0].message.parsed == Answer(degrees=5)
        grammar = grammar_of(served)
        assert "start: calls | answer" in grammar
        assert "degrees" in grammar
        assert "city" in grammar
        assert "tool_call" in grammar
        only = post(served, tools=[WEATHER], response_format={"type": "json_object"})
        assert only.is_success
        assert "start: calls | answer" in grammar_of(served)
        forced = {"tools": [WEATHER], "tool_choice": "required"}
        assert post(served, **forced, response_format={"type": "json_object"}).is_success
        assert "answer" not in grammar_of(served)
        error = error_of(post(served, tools=[WEATHER], guided_regex="a+"), 400)
        assert error["param"] == "guided_regex"
        bad = {"guided_json": {"uniqueItems": True}}
        assert error_of(post(served, tools=[WEATHER], **bad), 400)["param"] == "guided_json"


def test_answers_of_tools_come_back() -> None:
    options = {"chat_template": WITH_TOOLS, "tool_parser": "hermes"}
    with chatting(WRITTEN["hermes"], **options) as (client, served):
        message = create(client, tools=[WEATHER]).choices[0].message
        result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "5 degrees"}
        client.chat.completions.create(model="", messages=[*HI, message, result], tools=[WEATHER])
        assert '<tool_call>{"name": "weather", "arguments": {"city": "Köln"}}' in prompt_of(served)
        assert "tool: 5 degrees" in prompt_of(served)
        message.tool_calls[0].function.arguments = "{"
        with pytest.raises(openai.BadRequestError, match="arguments is not JSON"):
            client.chat.completions.create(model="", messages=[*HI, message], tools=[WEATHER])


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning(stream: bool) -> None:
    text = "<think>two and two</think>four"
    with chatting(text, chat_template=THINKING) as (client, served):
        if stream:
            usage = {"stream_options": {"include_usage": True}}
            *chunks, last = create(client, stream=True, **usage)
            deltas = [chunk.choices[0].delta for chunk in chunks]
            for name in ("reasoning_content", "reasoning"):
                assert "".join(getattr(it, name, "") or "" for it in deltas) == "two and two"
            assert "".join(it.content or "" for it in deltas) == "four"
            answer = last
        else:
            answer = create(client)
            message = answer.choices[0].message
            assert (message.reasoning, message.content) == ("two and two", "four")
            assert message.reasoning_content == "two and two"
        # The opening tag counts, too: the model wrote it.
        assert answer.usage.completion_tokens_details.reasoning_tokens == len("<think>two and two")
        hidden = post(served, include_reasoning=False, stream=stream)
        assert "two" not in hidden.text
        assert "four" in hidden.text or stream


def test_a_prompt_that_opens_the_reasoning_and_its_budget() -> None:
    end = tuple(b"</think>")
    with chatting("hm</think>\n\nfour", chat_template=OPENED) as (client, served):
        message = create(client).choices[0].message
        assert (message.reasoning, message.content) == ("hm", "four")
        create(client, extra_body={"thinking_token_budget": 7, "guided_regex": "a+"})
        constraint = served.engine.submitted[-1].constraint
        assert constraint is not None
        assert constraint.max_reasoning_tokens == 7
        assert constraint.reasoning_end == end
        assert constraint.reasoning_start == ()
        assert "a+" in constraint.grammar
        assert error_of(post(served, thinking_token_budget=-1), 400)["param"] == (
            "thinking_token_budget"
        )
    with chatting("x", chat_template=THINKING) as (client, served):
        create(client, extra_body={"thinking_token_budget": 0})
        constraint = served.engine.submitted[-1].constraint
        assert constraint is not None
        assert constraint.reasoning_start == tuple(b"<think>")
        assert constraint.grammar == ""


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (CHAT, {"reasoning_effort": "none"}),
        ("/v1/responses", {"input": "Hi", "reasoning": {"effort": "none"}}),
        ("/v1/messages", {"thinking": {"type": "disabled"}}),
        ("/v1/messages", {"output_config": {"effort": "none"}}),
        ("/api/chat", {"think": False}),
    ],
)
def test_no_thinking_is_the_same_in_every_api(path: str, fields: dict[str, Any]) -> None:
    shows = "{{ enable_thinking }} {{ thinking }}"
    with chatting("ok", chat_template=shows + THINKING) as (_, served):
        body = fields if "input" in fields else {"messages": HI, **fields}
        if path == "/v1/messages":
            body["max_tokens"] = 9
        answer = httpx.post(served.url + path, json={"model": MODEL, **body}, timeout=60)
        assert answer.is_success, answer.text
        assert prompt_of(served).startswith("False False")
        constraint = served.engine.submitted[-1].constraint
        assert constraint is not None
        assert constraint.max_reasoning_tokens == 0


def test_a_budget_of_a_model_that_does_not_reason() -> None:
    with chatting("ok") as (_, served):
        error = error_of(post(served, thinking_token_budget=7), 400)
        assert error["param"] == "thinking_token_budget"
        assert "gateway.reasoning_parser" in error["message"]
        assert post(served, thinking_token_budget=0).is_success
        # Clients of the Messages API send one to any model.
        body = {"messages": HI, "max_tokens": 9, "thinking": {"type": "enabled"}}
        body["thinking"] |= {"budget_tokens": 7}
        assert httpx.post(served.url + "/v1/messages", json=body, timeout=60).is_success


def test_a_message_that_goes_on() -> None:
    last = {"role": "assistant", "content": "The answer is "}
    with chatting("four", chat_template=CHAT_TEMPLATE) as (_, served):
        fields = {"messages": [*HI, last], "continue_final_message": True}
        answer = post(served, **fields).json()
        assert prompt_of(served) == "user: Hi\nassistant: The answer is "
        assert answer["choices"][0]["message"]["content"] == "four"
        echoed = post(served, **fields, echo=True).json()
        assert echoed["choices"][0]["message"]["content"] == "The answer is four"
        chunks = post(served, **fields, echo=True, stream=True).text
        assert "The answer is " in chunks
        wrong = post(served, **fields, add_generation_prompt=True)
        assert error_of(wrong, 400)["param"] == "continue_final_message"
        left_out = post(served, **fields, chat_template="nothing")
        assert error_of(left_out, 400)["param"] == "continue_final_message"


def test_documents_and_templates_of_a_request() -> None:
    with chatting("ok") as (_, served):
        template = "{{ messages[0].content }} {% for d in documents %}{{ d.text }};{% endfor %}"
        documents = [{"text": "one"}, {"text": "two"}]
        assert post(served, chat_template=template, documents=documents).is_success
        assert prompt_of(served) == "Hi one;two;"
        assert error_of(post(served, documents=["one"]), 400)["param"] == "documents"
        for bad in ("{% if %}", "{% for i in range(10**9) %}{% endfor %}", "{{ 1 / 0 }}"):
            assert error_of(post(served, chat_template=bad), 400)["param"] == "chat_template"
        assert post(served, chat_template="{{" * 100_000 + "x").status_code == 400


FITTED: dict[str, dict[str, Any]] = {
    "response_format": {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "c", "schema": PARAMETERS},
            "fit": True,
        }
    },
    "structured_outputs": {"structured_outputs": {"json": PARAMETERS, "fit": True}},
}


@pytest.mark.parametrize("name", FITTED)
def test_fit_reaches_the_engine_with_tools_and_without(name: str) -> None:
    fields = FITTED[name]
    loose = {name: fields[name] | {"fit": False}}
    with chatting("ok", chat_template=WITH_TOOLS, tool_parser="hermes") as (_, served):
        for tools in ({}, {"tools": [WEATHER]}, {"tools": [WEATHER], "tool_choice": "required"}):
            for body, fit in ((fields, True), (loose, False)):
                assert post(served, **body, **tools).is_success
                constraint = served.engine.submitted[-1].constraint
                assert constraint is not None
                assert constraint.fit is fit


@pytest.mark.parametrize(
    ("path", "name_field"),
    [
        (CHAT, "function.name"),
        ("/v1/responses", "name"),
        ("/v1/messages", "name"),
        ("/api/chat", "function.name"),
    ],
)
def test_every_api_has_the_same_rules_for_tools(path: str, name_field: str) -> None:
    flat = name_field == "name"
    body: dict[str, Any] = {"model": MODEL, "max_tokens": 9, "messages": HI}
    if path == "/v1/responses":
        body = {"input": "Hi"}

    def tool(name: str, parameters: Any = PARAMETERS) -> dict[str, Any]:
        if path == "/v1/messages":
            return {"name": name, "input_schema": parameters}
        function = {"name": name, "parameters": parameters}
        return {"type": "function", **function} if flat else {"function": function}

    with chatting("ok", chat_template=WITH_TOOLS, tool_parser="hermes") as (_, served):

        def message(**fields: Any) -> str:
            answer = httpx.post(served.url + path, json=body | fields, timeout=60)
            assert answer.status_code == 400, answer.text
            error = answer.json()["error"]
            return error if isinstance(error, str) else error["message"]

        assert "at most 512" in message(tools=[tool(f"f{i}") for i in range(513)])
        assert f"tools[0].{name_field} must have" in message(tools=[tool("two words")])
        assert f"tools[1].{name_field}: there is" in message(tools=[tool("f"), tool("f")])
        for wrong in ({"const": 5}, {"type": "array"}, {"type": ["object", "null"]}, {"enum": [1]}):
            refused = message(tools=[tool("f"), tool("g", wrong)])
            assert refused.startswith("tools[1]"), refused
            assert "object" in refused
        if path == "/api/chat":  # it has no choice of tools
            return
        required: Any = {"type": "any"} if path == "/v1/messages" else "required"
        assert "there are no tools" in message(tool_choice=required)
        choices: dict[str, Any] = {
            CHAT: {"type": "function", "function": {"name": "g"}},
            "/v1/responses": {"type": "function", "name": "g"},
            "/v1/messages": {"type": "tool", "name": "g"},
        }
        refused = message(tools=[tool("f")], tool_choice=choices[path])
        assert refused == "tool_choice names 'g', which is not among the tools"


def test_large_tools() -> None:
    with chatting("ok", chat_template=WITH_TOOLS, tool_parser="hermes") as (_, served):
        large = {"type": "object", "properties": {"x" * (1 << 20): {}}}
        for strict in (False, True):
            tool = {"function": {"name": "f", "parameters": large, "strict": strict}}
            assert error_of(post(served, tools=[tool]), 400)
        many = [{"function": {"name": f"f{i}"}} for i in range(1000)]
        assert error_of(post(served, tools=many), 400)["param"] == "tools"
        assert error_of(post(served, tools=[WEATHER, WEATHER]), 400)


def test_token_ids_are_returned() -> None:
    with chatting("ok") as (_, served):
        prompt = list(b"user: Hi\nassistant:")
        whole = post(served, return_token_ids=True).json()
        assert whole["prompt_token_ids"] == prompt
        assert whole["choices"][0]["token_ids"] == [*b"ok", END]
        body = {"return_token_ids": True, "stream": True, "stop": "okay"}
        lines = post(served, **body).text.split("\n\n")[:-2]
        chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
        assert chunks[0]["prompt_token_ids"] == prompt
        assert not any("prompt_token_ids" in chunk for chunk in chunks[1:])
        ids = [it for chunk in chunks for it in chunk["choices"][0]["token_ids"]]
        assert ids == [*b"ok", END]
        named = post(served, logprobs=True, return_tokens_as_token_ids=True).json()
        tokens = [it["token"] for it in named["choices"][0]["logprobs"]["content"]]
        assert tokens == ["token_id:111", "token_id:107", f"token_id:{END}"]
        url = served.url + "/v1/completions"
        body = {"prompt": ["ab", "c"], "return_token_ids": True}
        first, second = httpx.post(url, json=body).json()["choices"]
        assert (first["prompt_token_ids"], second["prompt_token_ids"]) == ([97, 98], [99])
        assert first["token_ids"] == [*b"ok", END]


def test_prompts_are_truncated() -> None:
    with chatting("ok") as (_, served):
        url = served.url + "/v1/completions"
        for prompt in ("abcdef", list(b"abcdef")):
            for fields, kept in (
                ({"truncate_prompt_tokens": 2}, b"ef"),
                ({"truncate_prompt_tokens": 2, "truncation_side": "right"}, b"ab"),
                ({"truncate_prompt_tokens": 99}, b"abcdef"),
            ):
                body = {"prompt": prompt, "echo": True, **fields}
                answer = httpx.post(url, json=body).json()
                assert answer["choices"][0]["text"] == kept.decode() + "ok"
                assert bytes(served.engine.submitted[-1].prompt) == kept
        for long in ("a" * 9000, [97] * 40_000):
            body = {"prompt": long, "truncate_prompt_tokens": -1, "max_tokens": 10}
            assert httpx.post(url, json=body).is_success
            assert len(served.engine.submitted[-1].prompt) == 4096 - 10
        assert post(served, truncate_prompt_tokens=3).is_success
        assert prompt_of(served) == "nt:"
        for bad in (0, -2, 5000):
            error = error_of(post(served, truncate_prompt_tokens=bad), 400)
            assert error["param"] == "truncate_prompt_tokens"
        assert error_of(post(served, truncation_side="up"), 400)["param"] == "truncation_side"


def test_the_best_of_several() -> None:
    with chatting("ok") as (_, served):
        url = served.url + "/v1/completions"
        answer = httpx.post(url, json={"prompt": ["a", "b"], "n": 2, "best_of": 3}).json()
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
        assert len(served.engine.submitted) == 6
        assert all(choice["logprobs"] is None for choice in answer["choices"])
        assert answer["usage"]["completion_tokens"] == 6 * 3
        for bad in ({"n": 3, "best_of": 2}, {"best_of": 2, "stream": True}):
            error = error_of(httpx.post(url, json={"prompt": "a", **bad}), 400)
            assert error["param"] == "best_of"
        error = error_of(httpx.post(url, json={"prompt": "a", "suffix": "b"}), 400)
        assert error["param"] == "suffix"


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_bad_words_never_come(path: str) -> None:
    with chatting("ok") as (_, served):

        def send(**fields: Any) -> httpx.Response:
            body = {"messages": HI} if path == CHAT else {"prompt": "Hi"}
            return httpx.post(served.url + path, json=body | fields, timeout=60)

        assert send(bad_words=["a", "bc", " a"], bad_token_ids=[5]).is_success
        request = served.engine.submitted[-1]
        assert request.sampling.bad_token_ids == (5,)
        assert request.constraint == ConstraintSpec(bad_sequences=((97,), (98, 99)))
        assert send(bad_words=["bc"], guided_regex="[a-z]+").is_success
        constraint = served.engine.submitted[-1].constraint
        assert constraint is not None
        assert "a-z" in constraint.grammar
        assert constraint.bad_sequences == ((98, 99),)
        for bad, word in (
            ([""], "[0] is empty"),
            (["a", " "], "[1] is empty"),
            (["x" * 300], "300 characters"),
            (["x" * 65], "65 tokens"),
            (["a"] * 2000, "2000 words"),
        ):
            error = error_of(send(bad_words=bad), 400)
            assert error["param"] == "bad_words"
            assert word in error["message"]
        error = error_of(send(bad_words=["a"], allowed_token_ids=[97]), 400)
        assert error["param"] == "bad_words"


def test_words_are_bad_behind_a_space_as_in_vllm() -> None:
    spellings = {"a": (1,), " a": (2,), "bc": (3, 4), " bc": (5, 4), "d": (6,), " d": (7, 6)}
    spellings |= {"e": (8, 9), " e": (8, 10)}
    found = bad_sequences(["a", " bc", "d", "e"], spellings.__getitem__)
    assert found == ((1,), (2,), (3, 4), (5, 4), (6,), (8, 9))


def test_what_is_not_there_yet_is_named() -> None:
    with chatting("ok") as (_, served):
        assert error_of(post(served, stop_regex=["a+"]), 400)["param"] == "stop_regex"


def test_prompts_without_an_answer() -> None:
    with chatting("ok", chat_template=WITH_TOOLS, tool_parser="hermes") as (_, served):
        body = {"messages": HI, "tools": [WEATHER]}
        shown = httpx.post(served.url + CHAT + "/render", json=body).json()
        assert shown["prompt"].startswith('tools: [{"type": "function"')
        assert bytes(shown["token_ids"]).decode() == shown["prompt"]
        counted = httpx.post(served.url + "/tokenize", json=body).json()
        assert counted["tokens"] == shown["token_ids"]
        assert not served.engine.submitted
        body = {"messages": [*HI, {"role": "assistant", "content": "So"}]}
        body |= {"continue_final_message": True, "chat_template": "{{ messages[1].content }}!"}
        assert httpx.post(served.url + "/tokenize", json=body).json()["tokens"] == list(b"So")
