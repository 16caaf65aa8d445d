"""The Responses API by the official openai client, unchanged."""

import json
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import Response
from pydantic import BaseModel

from tests.gateway.http.http_serving import MODEL
from tests.gateway.http.responses.responding import (
    ARGUMENTS,
    CALL,
    RESPONSES,
    WEATHER,
    check_event,
    create,
    raises,
    responding,
)

THOUGHT = "<think>\nLet me see.\n</think>\n\n"


def check(response: Any) -> None:
    """Validates a response as JSON against the package's type."""
    Response.model_validate_json(json.dumps(response))


def streamed(url: str, **body: Any) -> list[dict[str, Any]]:
    """The events of a raw stream, each valid and in order."""
    answer = httpx.post(url + RESPONSES, json={"input": "hi", "stream": True} | body)
    assert answer.status_code == 200, answer.text
    events = []
    for block in answer.text.strip().split("\n\n"):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        check_event(event)
        events.append(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def kinds(events: list[dict[str, Any]]) -> list[str]:
    """Types without the prefix; deltas in a row count once."""
    names = [event["type"].removeprefix("response.") for event in events]
    return [
        it for i, it in enumerate(names) if not it.endswith("delta") or names[i - 1 : i] != [it]
    ]


def test_a_text():
    with responding("Grüße 🙂") as (served, client, script):
        response = create(client, instructions="Be kind.", metadata={"a": "b"}, user="me")
        assert response.output_text == "Grüße 🙂"
        assert response.status == "completed"
        assert response.metadata == {"a": "b"}
        assert script.prompts == ["system: Be kind.\nuser: hi\nassistant: "]
        assert response.usage.input_tokens == len(script.prompts[0])
        assert response.usage.output_tokens == len("Grüße 🙂".encode()) + 1
        check(httpx.post(served.url + RESPONSES, json={"input": "hi"}).json())


def test_hints_are_accepted():
    with responding() as (_, client, _):
        response = create(
            client,
            include=["reasoning.encrypted_content", "file_search_call.results"],
            truncation="auto",
            service_tier="auto",
            prompt_cache_key="k",
            safety_identifier="s",
            max_tool_calls=3,
            temperature=0.5,
            top_p=0.9,
            text={"verbosity": "low"},
            reasoning={"summary": "auto"},
            parallel_tool_calls=False,
            tool_choice="auto",
            extra_body={"seed": 3, "top_k": 5, "stop": ["zz"]},
        )
        assert response.temperature == 0.5
        assert response.truncation == "auto"
        assert response.parallel_tool_calls is False


def test_a_stream_of_text():
    with responding("Hello!") as (served, client, _):
        events = streamed(served.url)
        assert kinds(events) == [
            *("created", "in_progress", "output_item.added", "content_part.added"),
            *("output_text.delta", "output_text.done", "content_part.done", "output_item.done"),
            "completed",
        ]
        deltas = [event["delta"] for event in events if event["type"].endswith("delta")]
        assert "".join(deltas) == "Hello!"
        with client.responses.stream(model=MODEL, input="hi") as stream:
            for _ in stream:
                pass
            assert stream.get_final_response().output_text == "Hello!"


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_cut_off_is_incomplete(stream: bool):
    with responding("Hello!") as (served, client, _):
        if stream:
            events = streamed(served.url, max_output_tokens=3)
            assert events[-1]["type"] == "response.incomplete"
            response = Response.model_validate(events[-1]["response"])
        else:
            response = create(client, max_output_tokens=3)
        assert response.status == "incomplete"
        assert response.incomplete_details is not None
        assert response.incomplete_details.reason == "max_output_tokens"
        assert response.output_text == "Hel"
        assert response.output[0].status == "incomplete"
        assert create(client, max_output_tokens=1).output_text == "H"
        # A bound beyond the context is none.
        assert create(client, max_output_tokens=10**9).status == "completed"


def test_reasoning_is_an_item():
    with responding(THOUGHT + "Yes.") as (served, client, script):
        response = create(client, reasoning={"effort": "low", "summary": "auto"})
        reasoning, message = response.output
        assert reasoning.type == "reasoning"
        assert reasoning.content[0].text == "Let me see."
        assert message.content[0].text == response.output_text == "Yes."
        assert 0 < response.usage.output_tokens_details.reasoning_tokens < 40
        assert script.prompts[0].startswith("effort: low\n")
        events = streamed(served.url)
        assert kinds(events) == [
            *("created", "in_progress"),
            *("output_item.added", "content_part.added", "reasoning_text.delta"),
            *("reasoning_text.done", "content_part.done", "output_item.done"),
            *("output_item.added", "content_part.added", "output_text.delta"),
            *("output_text.done", "content_part.done", "output_item.done", "completed"),
        ]
        # It comes back as it went out, and the template sees it.
        create(client, [{"role": "user", "content": "hi"}, *response.output, user("and?")])
        assert script.prompts[-1] == (
            "user: hi\nassistant: <think>Let me see.</think>Yes.\nuser: and?\nassistant: "
        )


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def test_tools_loop():
    """Plan, call, read the result, answer: with the whole input each time."""
    with responding(THOUGHT + CALL, "It is 7 °C.") as (_, client, script):
        history: list[Any] = [user("Weather in Köln?")]
        first = create(client, history, tools=[WEATHER])
        _, call = first.output
        assert (call.type, call.name, call.arguments) == ("function_call", "get_weather", ARGUMENTS)
        assert call.call_id.startswith("call_")
        history += first.output
        history.append(
            {"type": "function_call_output", "call_id": call.call_id, "output": '{"celsius": 7}'}
        )
        assert create(client, history, tools=[WEATHER]).output_text == "It is 7 °C."
        assert "get_weather" in script.prompts[0]
        assert script.prompts[1].endswith(
            "assistant: <think>Let me see.</think>"
            '<tool_call>{"name": "get_weather", "arguments": {"city": "Köln"}}</tool_call>\n'
            'tool: {"celsius": 7}\nassistant: '
        )


def test_tools_loop_with_stored_responses():
    with responding(CALL, "It is 7 °C.") as (_, client, script):
        first = create(client, "Weather?", tools=[WEATHER], instructions="Once.")
        output = {
            "type": "function_call_output",
            "call_id": first.output[0].call_id,
            "output": [{"type": "input_text", "text": "7"}],
        }
        second = create(client, [output], tools=[WEATHER], previous_response_id=first.id)
        assert second.output_text == "It is 7 °C."
        assert second.previous_response_id == first.id
        assert "Once." in script.prompts[0]
        assert "Once." not in script.prompts[1]  # instructions are not carried over
        assert script.prompts[1].endswith("</tool_call>\ntool: 7\nassistant: ")


def test_calls_are_streamed():
    with responding(f"Wait.\n{CALL}\n{CALL}") as (served, client, _):
        events = streamed(served.url, tools=[WEATHER])
        call = (
            *("output_item.added", "function_call_arguments.delta"),
            *("function_call_arguments.done", "output_item.done"),
        )
        assert kinds(events) == [
            *("created", "in_progress", "output_item.added", "content_part.added"),
            *("output_text.delta", "output_text.done", "content_part.done", "output_item.done"),
            *call,
            *call,
            "completed",
        ]
        deltas = [it["delta"] for it in events if it["type"].endswith("arguments.delta")]
        assert "".join(deltas) == ARGUMENTS * 2
        with client.responses.stream(model=MODEL, input="hi", tools=[WEATHER]) as stream:
            final = stream.get_final_response()
        assert [item.type for item in final.output] == ["message"] + ["function_call"] * 2
        assert final.output[1].call_id != final.output[2].call_id


@pytest.mark.parametrize(
    ("choice", "bound"),
    [
        ("none", False),
        ("auto", False),
        ("required", True),
        ({"type": "function", "name": "get_weather"}, True),
        (
            {
                "type": "allowed_tools",
                "mode": "required",
                "tools": [{"type": "function", "name": "get_weather"}],
            },
            True,
        ),
    ],
)
def test_tool_choice(choice: Any, bound: bool):
    with responding(CALL) as (served, client, script):
        tools = [WEATHER | {"strict": False}, WEATHER | {"name": "other", "strict": False}]
        response = create(client, tools=tools, tool_choice=choice, parallel_tool_calls=False)
        constraint = served.engine.submitted[-1].constraint
        assert (constraint is not None and bool(constraint.grammar)) is bound
        if choice == "none":
            assert "get_weather" not in script.prompts[0]
            assert response.output_text == CALL
        else:
            assert response.output[0].name == "get_weather"
        shows_other = '"other"' in script.prompts[0]
        assert shows_other is (choice != "none" and choice != "allowed" and "mode" not in choice)


class Point(BaseModel):
    x: int
    y: int


def test_parse_binds_and_reads_the_answer():
    with responding('{"x": 1, "y": 2}') as (served, client, _):
        parsed = client.responses.parse(model=MODEL, input="hi", text_format=Point)
        assert parsed.output_parsed == Point(x=1, y=2)
        assert served.engine.submitted[-1].constraint.grammar
        with client.responses.stream(model=MODEL, input="hi", text_format=Point) as stream:
            assert stream.get_final_response().output_parsed == Point(x=1, y=2)
        # A parsed answer comes back as it is.
        create(client, [user("hi"), *parsed.output, user("and?")])
        create(client, text={"format": {"type": "json_object"}})
        assert served.engine.submitted[-1].constraint.grammar


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(stream: bool):
    with responding("Hé") as (served, client, _):
        fields: Any = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
        if stream:
            events = streamed(served.url, **fields)
            response = Response.model_validate(events[-1]["response"])
            deltas = [it for it in events if it["type"] == "response.output_text.delta"]
            assert next(it["token"] for delta in deltas for it in delta["logprobs"]) == "H"
        else:
            response = create(client, **fields)
        message: Any = response.output[0]
        logprobs = message.content[0].logprobs
        assert len(logprobs) == response.usage.output_tokens == 4
        assert logprobs[0].token == "H"
        assert [len(it.top_logprobs) for it in logprobs][:2] == [2, 2]
        assert create(client).output[0].content[0].logprobs == []


def test_an_empty_answer_is_an_empty_message():
    with responding("") as (_, client, _):
        response = create(client)
        assert response.output_text == ""
        assert response.output[0].content[0].text == ""


def test_a_full_engine_and_a_crash():
    with responding("x" * 4000, step_s=0.005) as (served, client, _):
        stream = client.responses.create(model=MODEL, input="hi", stream=True)
        iterator = iter(stream)
        for _ in range(6):
            next(iterator)
        served.do(served.engine.crash)
        last = list(iterator)[-1]
        assert last.type == "response.failed"
        assert last.response.error.code == "server_error"
        assert last.response.output[0].status == "incomplete"
        error = raises(openai.InternalServerError, create, client, stream=True)
        assert error["type"] == "service_unavailable_error"
        served.do(served.engine.restart)


def test_the_template_takes_one_system_message():
    with responding() as (_, client, script):
        items = [
            {"role": "developer", "content": "b"},
            {"role": "system", "content": [{"type": "input_text", "text": "c"}]},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "d"}]},
            {"role": "assistant", "content": "e"},
            user("f"),
        ]
        create(client, items, instructions="a")
        assert script.prompts == [
            "system: a\n\nb\n\nc\nuser: d\nassistant: e\nuser: f\nassistant: "
        ]


@pytest.mark.parametrize("stream", [False, True])
def test_a_large_body_gets_the_answer_of_a_small_one(stream: bool):
    with responding() as (served, _, script):
        body = json.dumps({"input": [user("hé")], "tools": [WEATHER], "stream": stream})
        headers = {"content-type": "application/json"}
        for padding in ("", " " * (70 << 10)):
            content = (body[:-1] + padding + "}").encode()
            answer = httpx.post(served.url + RESPONSES, content=content, headers=headers)
            assert answer.status_code == 200, answer.text
        assert script.prompts[0] == script.prompts[1]
