"""What clients send unasked, and the defaults and answers that they expect."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from jserve.core.request import SamplingParams
from jserve.gateway.config import UnknownFields
from tests.gateway.http.http_serving import CHAT, COMPLETIONS, END, MODEL, Served, serving

HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(reply=lambda request: [*b"ok", END]) as served:
        yield served


def post(served: Served, path: str, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(served.url + path, json=body)


def sampling(served: Served, path: str, body: dict[str, Any]) -> SamplingParams:
    """The parameters with which the engine gets a request that is accepted."""
    response = post(served, path, body)
    assert response.status_code == 200, response.text
    return served.engine.submitted[-1].sampling


@pytest.mark.parametrize("stream", [False, True])
def test_completions_without_max_tokens_have_16(served: Served, stream: bool) -> None:
    body = {"prompt": "hi", "ignore_eos": True, "stream": stream}
    assert sampling(served, COMPLETIONS, body).max_tokens == 16
    assert sampling(served, COMPLETIONS, body | {"max_tokens": None}).max_tokens == 16
    assert sampling(served, COMPLETIONS, body | {"max_tokens": 17}).max_tokens == 17
    # As in vLLM, the default shrinks where a value that is given would be refused.
    assert sampling(served, COMPLETIONS, body | {"prompt": "x" * 4090}).max_tokens == 6


def test_chats_without_max_tokens_have_the_context(served: Served) -> None:
    prompt = len("user: Hi\nassistant:")
    assert sampling(served, CHAT, {"messages": HI}).max_tokens == 4096 - prompt


def test_the_config_can_say_another_default() -> None:
    with serving(reply=lambda request: [END], default_max_tokens=99) as served:
        assert sampling(served, COMPLETIONS, {"prompt": "hi"}).max_tokens == 99
        assert sampling(served, CHAT, {"messages": HI}).max_tokens == 99


@pytest.mark.parametrize("limit", [-1, -1.0])
def test_minus_one_is_no_limit(served: Served, limit: float) -> None:
    assert sampling(served, COMPLETIONS, {"prompt": "hi", "max_tokens": limit}).max_tokens == 4094
    for name in ("max_tokens", "max_completion_tokens"):
        body = {"messages": HI, name: limit}
        assert sampling(served, CHAT, body).max_tokens == 4096 - len("user: Hi\nassistant:")


def test_whole_floats_reach_the_engine_as_integers(served: Served) -> None:
    body = {"prompt": "hi", "max_tokens": 4.0, "top_k": 5.0, "seed": 7.0, "stop_token_ids": [9.0]}
    given = sampling(served, COMPLETIONS, body)
    assert (given.max_tokens, given.top_k, given.seed) == (4, 5, 7)
    assert given.stop_token_ids == (9,)
    body = {"prompt": "hi", "top_k": 4.5}
    assert post(served, COMPLETIONS, body).json()["error"]["param"] == "top_k"


def chunks(served: Served, path: str, body: dict[str, Any]) -> list[Any]:
    text = post(served, path, body | {"stream": True}).text
    events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert events.pop() == "[DONE]"
    return [json.loads(event) for event in events]


@pytest.mark.parametrize(
    ("path", "body"), [(COMPLETIONS, {"prompt": "hi"}), (CHAT, {"messages": HI})]
)
def test_every_chunk_can_have_its_usage(served: Served, path: str, body: dict[str, Any]) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}  # as GuideLLM sends it
    got = chunks(served, path, body | {"n": 2, "stream_options": options})
    last = got.pop()
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 2 * len("ok") + 2
    for index in (0, 1):
        usages = [it["usage"] for it in got if it["choices"][0]["index"] == index]
        counts = [usage["completion_tokens"] for usage in usages]
        assert counts == sorted(counts)
        assert counts[-1] == len("ok") + 1
        for usage in usages:
            assert usage["prompt_tokens"] == last["usage"]["prompt_tokens"]
            assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    alone = chunks(served, path, body | {"stream_options": {"continuous_usage_stats": True}})
    assert all(it["usage"] for it in alone)


def test_what_vllms_clients_look_for_is_null(served: Served) -> None:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=0) as client:
        chat: Any = client.chat.completions.create(model=MODEL, messages=HI, max_tokens=1)
        assert chat.prompt_logprobs is None
        text: Any = client.completions.create(model=MODEL, prompt="hi", max_tokens=1)
        assert text.choices[0].prompt_logprobs is None


def test_variables_reach_the_template() -> None:
    template = "{{ messages[0].content }}{% if not thinking %}!{% endif %}{{ reasoning_effort }}"
    with serving(chat_template=template) as served:
        for fields, prompt in (
            ({}, b"Hi!"),
            ({"chat_template_kwargs": {"thinking": True}}, b"Hi"),
            ({"reasoning_effort": "low"}, b"Hi!low"),
        ):
            body = {"messages": HI, "max_tokens": 1, **fields}
            assert post(served, CHAT, body).status_code == 200
            assert bytes(served.engine.submitted[-1].prompt) == prompt
            tokens = post(served, "/tokenize", {"messages": HI, **fields}).json()["tokens"]
            assert bytes(tokens) == prompt


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("size", [1, 70_000])  # large bodies are read by another process
def test_ignored_fields_are_named(stream: bool, size: int) -> None:
    message = {"role": "user", "content": "Hi", "mood": "good"}
    body = {
        "messages": [message],
        "max_tokens": 1,
        "stream": stream,
        "mirostat": 2,
        "naïve, x": 1,
        "metadata": {"a": "b" * size},
    }
    with serving(unknown_fields=UnknownFields.IGNORE) as served:
        response = post(served, CHAT, body)
        assert response.status_code == 200, response.text
        named = "mirostat, na%C3%AFve%2C%20x, messages[0].mood"
        assert response.headers["x-jserve-ignored-fields"] == named
        response = post(served, "/tokenize", {"prompt": "a", "foo": 1})
        assert response.headers["x-jserve-ignored-fields"] == "foo"
        response = post(served, COMPLETIONS, {"prompt": "a", "max_tokens": 1})
        assert "x-jserve-ignored-fields" not in response.headers
        many = {f"field{i}": i for i in range(1000)}
        response = post(served, COMPLETIONS, {"prompt": "a", "max_tokens": 1, **many})
        assert len(response.headers["x-jserve-ignored-fields"]) < 1000
        assert response.headers["x-jserve-ignored-fields"].endswith(", ...")


def test_unknown_fields_are_refused_by_default(served: Served) -> None:
    body = {"messages": HI, "mirostat": 2}
    assert post(served, CHAT, body).json()["error"]["param"] == "mirostat"


def test_aliases_of_the_model() -> None:
    names = ("gpt-4o", "mine/alias")
    with (
        serving(served_model_name="real", served_model_aliases=names) as served,
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=0) as client,
    ):
        assert [model.id for model in client.models.list()] == ["real", *names]
        assert client.models.retrieve("mine/alias").id == "mine/alias"
        for name in ("real", *names):
            answer = client.completions.create(model=name, prompt="hi", max_tokens=1)
            assert answer.model == "real"  # as vLLM has it
        with pytest.raises(openai.NotFoundError, match="'real' or 'gpt-4o'"):
            client.completions.create(model=MODEL, prompt="hi")


def test_the_fingerprint_follows_what_an_answer_depends_on(served: Served) -> None:
    def of(served: Served) -> str:
        body = {"messages": HI, "max_tokens": 1}
        found = {post(served, CHAT, body).json()["system_fingerprint"]}
        found |= {it["system_fingerprint"] for it in chunks(served, CHAT, body)}
        found.add(post(served, COMPLETIONS, {"prompt": "a"}).json()["system_fingerprint"])
        (one,) = found
        assert one.startswith("fp_")
        return one

    first = of(served)
    with serving(num_slots=3) as same:
        assert of(same) == first
    with serving(default_top_p=0.5) as other:
        assert of(other) != first


@pytest.mark.parametrize(
    "origin",
    [
        *("http://localhost", "http://localhost:3000", "https://127.0.0.1:8443"),
        *("http://[::1]:5173", "http://app.localhost:1234"),
    ],
)
def test_pages_of_this_machine_may_call(served: Served, origin: str) -> None:
    ask = {
        "origin": origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    allowed = httpx.options(served.url + CHAT, headers=ask)
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == origin
    headers = {"origin": origin}
    got = httpx.post(served.url + CHAT, json={"messages": HI, "max_tokens": 1}, headers=headers)
    assert got.headers["access-control-allow-origin"] == origin
    assert "x-request-id" in got.headers["access-control-expose-headers"].lower()


@pytest.mark.parametrize(
    "origin",
    [
        *("null", "http://localhost.evil.example", "http://evil.example:80", "file://"),
        *("http://127.0.0.1.evil.example", "http://localhost:3000@evil.example", "http://10.0.0.1"),
    ],
)
def test_pages_from_elsewhere_may_not(served: Served, origin: str) -> None:
    ask = {"origin": origin, "access-control-request-method": "POST"}
    for answer in (
        httpx.options(served.url + CHAT, headers=ask),
        httpx.get(served.url + "/v1/models", headers=ask),
    ):
        assert not any(name.startswith("access-control") for name in answer.headers)


def test_tokens_are_spelled_as_in_the_vocabulary(served: Served) -> None:
    tokenizer = served.plane.tokenizer._tokenizer
    body = {"prompt": " is 世<|end|>", "return_token_strs": True}
    data = post(served, "/tokenize", body).json()
    # transformers' convert_ids_to_tokens, which vLLM calls, looks the id up.
    assert data["token_strs"] == [tokenizer.id_to_token(it) for it in data["tokens"]]
    assert data["token_strs"][0] == "Ġ"
    assert data["token_strs"][-1] == "<|end|>"


def test_tokenizer_info(served: Served) -> None:
    data = httpx.get(f"{served.url}/tokenizer_info").json()
    assert data["tokenizer_class"]
    assert data["eos_token"] == "<|end|>"
    assert data["model_max_length"] == 4096
    assert data["chat_template"] == served.plane.chat_template.source
    assert data["added_tokens_decoder"][str(END)]["content"] == "<|end|>"
    assert data["added_tokens_decoder"][str(END)]["special"] is True
    # What lm-eval does with it: the end-of-sequence token is one id.
    body = {"prompt": data["eos_token"], "add_special_tokens": False}
    assert post(served, "/tokenize", body).json()["tokens"] == [END]
