"""The Ollama API: what is asked, and what is answered, whole and in lines."""

import datetime
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.gateway.http.agent_serving import WEATHER, Agent, call_text, serving_agent
from tests.gateway.http.http_serving import MODEL, serving

CHAT = "/api/chat"
GENERATE = "/api/generate"
TOOL = {
    "type": "function",
    "function": {"name": "weather", "description": "Tells the weather.", "parameters": WEATHER},
}
CALL = call_text("weather", '{"city": "Bern"}')
DURATIONS = {"total_duration", "load_duration", "prompt_eval_duration", "eval_duration"}


@pytest.fixture(scope="module")
def agent() -> Iterator[Agent]:
    with serving_agent() as agent:
        yield agent


def chat(*messages: Any, **fields: Any) -> dict[str, Any]:
    turns = messages or ({"role": "user", "content": "hi"},)
    return {"model": MODEL, "messages": list(turns), **fields}


def generate(prompt: str = "hi", **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": prompt, **fields}


def post(agent: Agent, path: str, asked: dict[str, Any]) -> dict[str, Any]:
    response = httpx.post(agent.url + path, json={"stream": False, **asked})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/json"
    return response.json()


def lines(agent: Agent, path: str, asked: dict[str, Any]) -> list[dict[str, Any]]:
    response = httpx.post(agent.url + path, json=asked)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in response.text.splitlines()]


def joined(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The whole answer that the lines make."""
    assert [line["done"] for line in found] == [False] * (len(found) - 1) + [True]
    whole = found[-1]
    if "response" in whole:
        for key in ("response", "thinking"):
            if text := "".join(line.get(key, "") for line in found):
                whole[key] = text
        return whole
    messages = [line["message"] for line in found]
    for key in ("content", "thinking"):
        if text := "".join(message.get(key, "") for message in messages):
            whole["message"][key] = text
    if calls := [call for message in messages for call in message.get("tool_calls", ())]:
        whole["message"]["tool_calls"] = calls
    return whole


def settled(answer: dict[str, Any]) -> dict[str, Any]:
    """The answer without what differs each time."""
    for call in answer.get("message", {}).get("tool_calls", ()):
        assert call.pop("id")
    created = datetime.datetime.fromisoformat(answer.pop("created_at"))
    assert created.tzinfo is not None
    for name in DURATIONS:
        assert type(answer.pop(name)) is int
    return answer


def both(agent: Agent, path: str, asked: dict[str, Any]) -> dict[str, Any]:
    """The whole answer, which the streamed one equals."""
    whole = settled(post(agent, path, asked))
    assert settled(joined(lines(agent, path, asked))) == whole
    return whole


def test_chat(agent: Agent) -> None:
    agent.says = "Grüße, 世界!"
    assert both(agent, CHAT, chat()) == {
        "model": MODEL,
        "done": True,
        "message": {"role": "assistant", "content": agent.says},
        "done_reason": "stop",
        "prompt_eval_count": len(agent.prompt),
        "eval_count": len(agent.says.encode()) + 1,
    }
    assert agent.prompt == "user: hi\nassistant:"


def test_generate(agent: Agent) -> None:
    agent.says = "one two"
    assert both(agent, GENERATE, generate(system="Be kind.")) == {
        "model": MODEL,
        "done": True,
        "response": "one two",
        "done_reason": "stop",
        "prompt_eval_count": len(agent.prompt),
        "eval_count": 8,
    }
    assert agent.prompt == "system: Be kind.\nuser: hi\nassistant:"
    answer = both(agent, GENERATE, generate("plain", raw=True, options={"num_predict": 3}))
    assert agent.prompt == "plain"
    assert (answer["response"], answer["done_reason"]) == ("one", "length")


def test_names(agent: Agent) -> None:
    agent.says = "ok"
    name = f"{MODEL}:latest"
    assert post(agent, CHAT, chat() | {"model": name})["model"] == name
    (model,) = httpx.get(f"{agent.url}/api/tags").json()["models"]
    assert model["name"] == model["model"] == name
    assert len(model["digest"]) == 64
    assert model["details"]["families"]
    datetime.datetime.fromisoformat(model["modified_at"])
    (model,) = httpx.get(f"{agent.url}/api/ps").json()["models"]
    assert (model["name"], model["context_length"]) == (name, 4096)
    shown = httpx.post(f"{agent.url}/api/show", json={"model": name}).json()
    assert shown["capabilities"] == ["completion", "tools", "thinking"]
    family = shown["model_info"]["general.architecture"]
    assert shown["model_info"][f"{family}.context_length"] == 4096
    assert "<tool_call>" in shown["template"]
    assert httpx.get(f"{agent.url}/api/version").json().keys() == {"version"}


def test_options(agent: Agent) -> None:
    agent.says = "one two"
    options = {
        "temperature": 0.5,
        "top_k": 7,
        "top_p": 0.9,
        "min_p": 0.1,
        "seed": 42,
        "repeat_penalty": 1.25,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "num_predict": 9,
        "num_ctx": 2048,
        "num_gpu": 1,
        "mirostat": 0,
        "stop": [" two"],
    }
    answer = both(agent, GENERATE, generate(options=options, keep_alive="5m"))
    assert (answer["response"], answer["done_reason"]) == ("one", "stop")
    sampling = agent.request.sampling
    for name in ("temperature", "top_k", "top_p", "min_p", "seed", "presence_penalty"):
        assert getattr(sampling, name) == options[name], name
    assert sampling.frequency_penalty == -0.5
    assert sampling.repetition_penalty == 1.25
    assert sampling.max_tokens == 9
    post(agent, CHAT, chat(options={"num_predict": -1}))
    assert agent.request.sampling.max_tokens == 4096 - len(agent.prompt)
    post(agent, CHAT, chat(options={"num_predict": 1_000_000}))
    assert agent.request.sampling.max_tokens == 4096 - len(agent.prompt)


def test_a_call_of_a_tool(agent: Agent) -> None:
    agent.says = f"Let me see. {CALL}\n{CALL}"
    answer = both(agent, CHAT, chat(tools=[TOOL]))
    message = answer["message"]
    assert message["content"] == "Let me see."
    assert [call["function"] for call in message["tool_calls"]] == [
        {"index": index, "name": "weather", "arguments": {"city": "Bern"}} for index in (0, 1)
    ]
    assert answer["done_reason"] == "stop"
    agent.says = "Sunny."
    calls = [{"function": {"name": "weather", "arguments": {"city": "Bern"}}}]
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "", "tool_calls": calls, "thinking": "Hm."},
        {"role": "tool", "content": "sunny", "tool_name": "weather"},
    ]
    post(agent, CHAT, chat(*turns, tools=[TOOL]))
    assert agent.prompt.endswith(
        'assistant: <think>Hm.</think><tool_call>{"name": "weather", "arguments": '
        '{"city": "Bern"}}</tool_call>\ntool weather: sunny\nassistant:'
    )
    agent.says = CALL
    cut = post(agent, CHAT, chat(tools=[TOOL], options={"num_predict": len(CALL) - 20}))
    assert cut["message"] == {"role": "assistant", "content": ""}
    assert cut["done_reason"] == "length"


def test_thinking(agent: Agent) -> None:
    agent.says = "<think>Hm, well.</think>Yes."
    message = both(agent, CHAT, chat(think=True))["message"]
    assert message == {"role": "assistant", "content": "Yes.", "thinking": "Hm, well."}
    answer = both(agent, GENERATE, generate(think="low"))
    assert (answer["response"], answer["thinking"]) == ("Yes.", "Hm, well.")
    agent.says = "Yes."
    post(agent, CHAT, chat(think=False))
    assert agent.prompt.endswith("assistant:<think></think>")


@pytest.mark.parametrize("form", ["json", WEATHER])
def test_a_form_binds_the_answer(agent: Agent, form: Any) -> None:
    agent.says = '{"city": "Bern"}'
    for asked in (generate(format=form), generate(format=form, raw=True)):
        assert both(agent, GENERATE, asked)["response"] == agent.says
        assert agent.request.constraint is not None
    post(agent, CHAT, chat(format=""))
    assert agent.request.constraint is None


def test_loading(agent: Agent) -> None:
    for path in (CHAT, GENERATE):
        answer = httpx.post(agent.url + path, json={"model": MODEL}).json()
        assert (answer["done"], answer["done_reason"]) == (True, "load")
        body = {"model": MODEL, "keep_alive": 0}
        assert httpx.post(agent.url + path, json=body).json()["done_reason"] == "unload"


def test_a_model_without_a_template() -> None:
    with serving(chat_template=None) as served:
        url = served.url + GENERATE
        asked = generate("ab", options={"num_predict": 4}, stream=False)
        assert httpx.post(url, json=asked).json()["response"] == "abab"
        assert "template" in error_of(httpx.post(url, json=asked | {"system": "x"}), 400)


def error_of(response: httpx.Response, status: int) -> str:
    assert response.status_code == status, response.text
    assert response.json().keys() == {"error"}
    assert type(response.json()["error"]) is str
    return response.json()["error"]


@pytest.mark.parametrize(
    ("path", "fields", "words"),
    [
        (CHAT, {"model": None}, "model is missing"),
        (CHAT, {"messages": "hi"}, "messages must be a list"),
        (CHAT, {"messages": [{"role": "user", "content": "", "images": ["a"]}]}, "images"),
        (CHAT, {"messages": [{"content": ""}]}, "role must be a string"),
        (CHAT, {"tools": [{"type": "search"}]}, "tools[0] must be of type function"),
        (CHAT, {"tools": [TOOL, TOOL]}, "another tool of the name"),
        (CHAT, {"format": "xml"}, "format must be json or a JSON schema"),
        (CHAT, {"think": "much"}, "think must be"),
        (CHAT, {"options": {"temperature": 1000}}, "temperature"),
        (CHAT, {"options": {"mirostat": 1}}, "options.mirostat: not supported yet"),
        (CHAT, {"options": {"repeat_penalty": 1.1, "repeat_last_n": 32}}, "repeat_last_n"),
        (CHAT, {"options": {"num_predict": 0}}, "num_predict"),
        (CHAT, {"logprobs": True}, "logprobs: not supported yet"),
        (GENERATE, {"suffix": "x"}, "suffix: not supported yet"),
        (GENERATE, {"template": "x"}, "template: not supported yet"),
        (GENERATE, {"context": [1]}, "context: not supported yet"),
        (GENERATE, {"images": ["a"]}, "images: not supported yet"),
        (GENERATE, {"raw": True, "system": "x"}, "system"),
        (GENERATE, {"promt": "x"}, "did you mean 'prompt'"),
    ],
)
def test_bad_fields(agent: Agent, path: str, fields: dict[str, Any], words: str) -> None:
    asked = (chat() if path == CHAT else generate()) | fields
    assert words in error_of(httpx.post(agent.url + path, json=asked), 400)


def test_other_errors(agent: Agent) -> None:
    url = agent.url
    assert "'other'" in error_of(httpx.post(url + CHAT, json=chat() | {"model": "other"}), 404)
    error_of(httpx.post(f"{url}/api/show", json={"model": "other"}), 404)
    error_of(httpx.post(f"{url}/api/embed", json={"model": MODEL}), 404)
    error_of(httpx.get(url + CHAT), 405)
    with serving(api_keys=("secret",)) as served:
        error_of(httpx.get(f"{served.url}/api/tags"), 401)
        key = {"authorization": "Bearer secret"}
        assert httpx.get(f"{served.url}/api/tags", headers=key).status_code == 200


def test_an_engine_that_dies() -> None:
    with serving(step_s=0.02, sse_keep_alive_s=0.01) as served:
        asked = chat(options={"num_predict": 4000})
        with httpx.stream("POST", served.url + CHAT, json=asked) as response:
            found = response.iter_lines()
            assert not json.loads(next(found))["done"]
            served.do(served.engine.crash)
            *_, last = found
        assert json.loads(last).keys() == {"error"}
        served.do(served.engine.restart)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_the_engine(stream: bool) -> None:
    with serving(step_s=0.005) as served:
        data = json.dumps(chat(stream=stream)).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        with socket.create_connection(("127.0.0.1", served.port)) as raw:
            raw.sendall(head.encode() + b"content-length: %d\r\n\r\n" % len(data) + data)
            while not served.engine.stats.num_running:
                time.sleep(0.002)
        served.assert_idle(timeout_s=5.0)
        assert len(served.engine.aborted) == 1


def test_a_large_body(agent: Agent) -> None:
    agent.says = "ok"
    asked = chat(tools=[TOOL], keep_alive="x" * 100_000, options={"stop": ["k"]})
    assert both(agent, CHAT, asked)["message"]["content"] == "o"
