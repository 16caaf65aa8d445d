"""The official openai client, unchanged, against the real server; shapes against its own types."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import BaseModel

from tests.gateway.http.http_serving import END, MODEL, Served, serving

# Fields that the server adds to OpenAI's shapes, as vLLM does.
EXTENSIONS = {"stop_reason", "prompt_logprobs", "root", "parent", "max_model_len"}
TEXT = "Grüße, 世界! 🙂 ok"


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    def reply(request: Any) -> list[int]:
        return [*TEXT.encode(), END]

    with serving(reply=reply, any_priority=True) as served:
        yield served


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0) as client:
        yield client


def chat(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def check(shape: type[BaseModel], data: dict[str, Any]) -> Any:
    """Validates as JSON, strictly, and refuses fields that neither OpenAI nor vLLM has."""
    model = shape.model_validate_json(json.dumps(data), strict=True)
    _check_extra(model)
    return model


def _check_extra(value: object) -> None:
    if isinstance(value, BaseModel):
        assert set(value.model_extra or ()) <= EXTENSIONS, value
        for name in type(value).model_fields:
            _check_extra(getattr(value, name))
    elif isinstance(value, list):
        for item in value:
            _check_extra(item)


def events(text: str) -> list[Any]:
    assert text.endswith("\n\n")
    lines = [line.removeprefix("data: ") for line in text.split("\n\n")[:-1]]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def test_models(client: openai.OpenAI, served: Served) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    data = httpx.get(f"{served.url}/v1/models").json()
    assert data["object"] == "list"
    assert check(Model, data["data"][0]).max_model_len == 4096


def test_completion(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="hi", max_tokens=100)
    assert answer.choices[0].text == TEXT
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 2
    assert answer.usage.completion_tokens == len(TEXT.encode()) + 1
    assert answer.usage.total_tokens == answer.usage.completion_tokens + 2


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=chat("hi"), max_completion_tokens=5
    )
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content == TEXT.encode()[:5].decode(errors="replace")
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len("user: hi\nassistant:")


def test_an_answer_can_be_sent_back_as_it_came(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(model=MODEL, messages=chat("hi"), max_tokens=100)
    message: Any = first.choices[0].message
    for replayed in (
        message,
        message.model_dump(),
        message.to_dict(),
        message.model_dump() | {"annotations": []},
    ):
        history = [*chat("hi"), replayed, *chat("and?")]
        answer = client.chat.completions.create(model=MODEL, messages=history, max_tokens=1)
        assert answer.usage is not None
        prompt = f"user: hi\nassistant: {TEXT}\nuser: and?\nassistant:"
        assert answer.usage.prompt_tokens == len(prompt.encode())


def test_streams_join_to_the_whole(client: openai.OpenAI) -> None:
    chunks = list(
        client.completions.create(
            model=MODEL,
            prompt="hi",
            max_tokens=100,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == TEXT
    assert all("\ufffd" not in chunk.choices[0].text for chunk in chunks[:-1])
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(TEXT.encode()) + 1
    parts = list(
        client.chat.completions.create(
            model=MODEL, messages=chat("hi"), max_tokens=100, stream=True
        )
    )
    assert parts[0].choices[0].delta.role == "assistant"
    assert all(part.choices[0].delta.role is None for part in parts[1:])
    assert "".join(part.choices[0].delta.content or "" for part in parts) == TEXT
    assert [part.choices[0].finish_reason for part in parts[-2:]] == [None, "stop"]
    assert all(part.usage is None for part in parts)


def test_async_client(served: Served) -> None:
    async def one(client: openai.AsyncOpenAI) -> str:
        stream = await client.chat.completions.create(
            model=MODEL, messages=chat("hi"), max_tokens=100, stream=True
        )
        return "".join([part.choices[0].delta.content or "" async for part in stream])

    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="any") as client:
            assert await asyncio.gather(*(one(client) for _ in range(20))) == [TEXT] * 20
            answer = await client.completions.create(model=MODEL, prompt="hi", max_tokens=100)
            assert answer.choices[0].text == TEXT

    asyncio.run(run())


def test_stop_and_n(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt=["a", "b", "c"], n=2, stop=["界", "zzz"], max_tokens=100
    )
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert {choice.text for choice in answer.choices} == {"Grüße, 世"}
    assert {
        choice.model_extra["stop_reason"] for choice in answer.choices if choice.model_extra
    } == {"界"}
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 3


def test_prompts_keep_their_choices_apart() -> None:
    prompts = ["aa", "bbb", "cccc", "ddddd"]
    with serving(num_slots=3) as served:
        body: dict[str, Any] = {"prompt": prompts, "n": 2, "max_tokens": 6}
        data = httpx.post(f"{served.url}/v1/completions", json=body).json()
        expected = [prompt[0] * 6 for prompt in prompts for _ in range(2)]
        assert [choice["text"] for choice in data["choices"]] == expected
        assert data["usage"]["prompt_tokens"] == 14
        ids = body | {"prompt": [list(prompt.encode()) for prompt in prompts]}
        data = httpx.post(f"{served.url}/v1/completions", json=ids).json()
        assert [choice["text"] for choice in data["choices"]] == expected
        texts = [""] * 8
        for chunk in events(
            httpx.post(f"{served.url}/v1/completions", json=body | {"stream": True}).text
        ):
            for choice in chunk["choices"]:
                texts[choice["index"]] += choice["text"]
        assert texts == expected


def test_echo_and_logprobs(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt="añb", echo=True, logprobs=2, max_tokens=4
    )
    choice = answer.choices[0]
    assert choice.text == "añb" + TEXT.encode()[:4].decode()
    logprobs = choice.logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.token_logprobs is not None
    assert logprobs.top_logprobs is not None
    assert len(logprobs.tokens) == len("añb".encode()) + 4
    assert logprobs.token_logprobs == [None, *[-0.5] * 7]
    assert logprobs.text_offset == [0, 1, 1, 2, 3, 4, 5, 5]
    assert logprobs.top_logprobs[3] == {"b": -0.5, "c": -1.0}
    # Half a character is named by its bytes, in both lists.
    assert logprobs.tokens[:3] == ["a", "bytes:\\xc3", "bytes:\\xb1"]
    assert logprobs.top_logprobs[1] == {"bytes:\\xc3": -0.5, "bytes:\\xc4": -1.0}
    for token, top, logprob in zip(
        logprobs.tokens[1:], logprobs.top_logprobs[1:], logprobs.token_logprobs[1:], strict=True
    ):
        assert top[token] == logprob


def test_echo_alone_scores_the_prompt(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt="abc", echo=True, logprobs=0, max_tokens=0
    )
    assert answer.choices[0].text == "abc"
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.tokens == ["a", "b", "c"]
    assert answer.choices[0].logprobs.top_logprobs == [None, {"b": -0.5}, {"c": -0.5}]


def test_chat_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=chat("hi"), logprobs=True, top_logprobs=3, max_tokens=4
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    raw = b"".join(bytes(entry.bytes or ()) for entry in logprobs.content)
    assert raw == TEXT.encode()[:4]
    assert [top.token for top in logprobs.content[0].top_logprobs] == ["G", "H", "I"]
    for entry in logprobs.content:
        assert entry.token == entry.top_logprobs[0].token
    assert [entry.token for entry in logprobs.content][2:] == ["bytes:\\xc3", "bytes:\\xbc"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body", "whole", "chunk"),
    [
        ("completions", {"prompt": "hi"}, Completion, Completion),
        ("completions", {"prompt": "hi", "logprobs": 1}, Completion, Completion),
        ("chat/completions", {"messages": chat("hi")}, ChatCompletion, ChatCompletionChunk),
        (
            "chat/completions",
            {"messages": chat("hi"), "logprobs": True, "top_logprobs": 2, "prompt_logprobs": 1},
            ChatCompletion,
            ChatCompletionChunk,
        ),
    ],
)
def test_shapes(
    served: Served,
    path: str,
    body: dict[str, Any],
    whole: type[BaseModel],
    chunk: type[BaseModel],
    stream: bool,
) -> None:
    body = body | {"model": MODEL, "max_tokens": 3, "n": 2, "stream": stream}
    if stream:
        body["stream_options"] = {"include_usage": True}
    response = httpx.post(f"{served.url}/v1/{path}", json=body)
    assert response.status_code == 200
    if not stream:
        answer = check(whole, response.json())
        assert [choice.finish_reason for choice in answer.choices] == ["length", "length"]
        return
    assert response.headers["content-type"].startswith("text/event-stream")
    chunks = events(response.text)
    assert len({(it["id"], it["created"], it["model"]) for it in chunks}) == 1
    for it in chunks:
        for choice in it["choices"]:
            # OpenAI's own type of text completion chunks forgets that they have none yet.
            if choice["finish_reason"] is None and whole is chunk:
                choice["finish_reason"] = "stop"
        check(chunk, it)


def test_prompt_logprobs(served: Served) -> None:
    body = {"prompt": "abc", "prompt_logprobs": 1, "max_tokens": 1}
    data = httpx.post(f"{served.url}/v1/completions", json=body).json()
    one = data["choices"][0]["prompt_logprobs"]
    assert one[0] is None
    assert one[1] == {"98": {"logprob": -0.5, "rank": 1, "decoded_token": "b"}}
    body = {"messages": chat("abc"), "prompt_logprobs": 1, "max_tokens": 1}
    data = httpx.post(f"{served.url}/v1/chat/completions", json=body).json()
    assert len(data["prompt_logprobs"]) == data["usage"]["prompt_tokens"]


def test_sampling_fields_reach_the_engine(served: Served) -> None:
    given = {
        "temperature": 0.5,
        "top_k": 7,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.5,
        "presence_penalty": 0.25,
        "frequency_penalty": -0.25,
        "seed": 99,
        "min_tokens": 2,
        "ignore_eos": True,
        "stop_token_ids": [1, 2],
        "allowed_token_ids": [10, 11],
        "bad_token_ids": [12],
        "prompt_logprobs": 2,
        "max_tokens": 3,
    }
    body = {"prompt": [1, 2, 3], "logit_bias": {"5": 1.5}, "priority": -3, "logprobs": 4, **given}
    assert httpx.post(f"{served.url}/v1/completions", json=body).status_code == 200
    request = served.engine.submitted[-1]
    assert request.prompt == (1, 2, 3)
    assert request.priority == -3
    assert request.sampling.logit_bias == ((5, 1.5),)
    assert request.sampling.logprobs == 4
    for name, value in given.items():
        expected = tuple(value) if isinstance(value, list) else value
        assert getattr(request.sampling, name) == expected, name


@pytest.mark.parametrize(
    "field",
    [
        {"user": "me"},
        {"metadata": {"a": "b"}},
        {"store": True},
        {"service_tier": "auto"},
        {"response_format": {"type": "text"}},
        {"tools": None},
        {"tools": []},
        {"tool_choice": "none"},
        {"parallel_tool_calls": True},
        {"modalities": ["text"]},
        {"stream_options": None},
        {"stop": None},
        {"temperature": None},
        {"logit_bias": None},
        {"top_logprobs": None},
    ],
)
def test_accepted_without_effect(served: Served, field: dict[str, Any]) -> None:
    body = {"messages": chat("hi"), "max_tokens": 2, **field}
    response = httpx.post(f"{served.url}/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text


def test_tokenize(served: Served) -> None:
    def post(path: str, body: dict[str, Any]) -> dict[str, Any]:
        response = httpx.post(served.url + path, json=body)
        assert response.status_code == 200, response.text
        return response.json()

    data = post("/tokenize", {"prompt": TEXT, "return_token_strs": True})
    assert data["tokens"] == list(TEXT.encode())
    assert data["count"] == len(TEXT.encode())
    assert data["max_model_len"] == 4096
    assert data["token_strs"][0] == "G"
    assert post("/detokenize", {"tokens": data["tokens"]}) == {"prompt": TEXT}
    data = post("/tokenize", {"messages": chat("hi"), "add_generation_prompt": False})
    assert bytes(data["tokens"]) == b"user: hi\n"
