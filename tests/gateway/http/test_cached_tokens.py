"""`usage.prompt_tokens_details.cached_tokens`, and the salts under which the engine keeps pages."""

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from jserve.core.request import Request
from tests.gateway.http.http_serving import CHAT, COMPLETIONS, END, MODEL, Served, serving
from tests.gateway.http.test_openai import check, events

HI: list[Any] = [{"role": "user", "content": "hi"}]
ROUTES = [(COMPLETIONS, {"prompt": "hi"}), (CHAT, {"messages": HI})]


def cached(request: Request) -> int:
    """A number for each prompt and choice; a prompt of "cold" has nothing."""
    text = bytes(request.prompt)
    return 0 if b"cold" in text else 16 * len(text) + request.choice


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving(reply=lambda request: [*b"ok", END], cached=cached) as served:
        yield served


def post(served: Served, path: str, body: dict[str, Any], **headers: str) -> httpx.Response:
    response = httpx.post(served.url + path, json=body, headers=headers)
    assert response.status_code == 200, response.text
    return response


def expected(path: str) -> int:
    return 16 * len("hi" if path == COMPLETIONS else "user: hi\nassistant:")


@pytest.mark.parametrize(("path", "body"), ROUTES)
@pytest.mark.parametrize("n", [1, 3])
def test_a_whole_answer_has_the_number_of_its_first_choice(
    served: Served, path: str, body: dict[str, Any], n: int
) -> None:
    data = post(served, path, body | {"n": n}).json()
    assert data["usage"]["prompt_tokens_details"] == {"cached_tokens": expected(path)}
    assert data["usage"]["prompt_tokens"] == expected(path) // 16
    check(Completion if path == COMPLETIONS else ChatCompletion, data)


@pytest.mark.parametrize(("path", "body"), ROUTES)
@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_says_it_with_the_usage_and_in_every_chunk(
    served: Served, path: str, body: dict[str, Any], n: int
) -> None:
    options = {"include_usage": True}
    *chunks, last = events(
        post(served, path, body | {"n": n, "stream": True, "stream_options": options}).text
    )
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": expected(path)}
    assert all(chunk["usage"] is None for chunk in chunks)
    check(Completion if path == COMPLETIONS else ChatCompletionChunk, last)
    options["continuous_usage_stats"] = True
    chunks = events(
        post(served, path, body | {"n": n, "stream": True, "stream_options": options}).text
    )
    assert len(chunks) > n
    for chunk in chunks:
        assert chunk["usage"]["prompt_tokens_details"] == {"cached_tokens": expected(path)}


def test_nothing_found_is_zero_and_not_absent(served: Served) -> None:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=0) as client:
        whole = client.completions.create(model=MODEL, prompt="cold")
        chat = client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "cold"}]
        )
        *_, last = client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "cold"}],
            stream=True,
            stream_options={"include_usage": True},
        )
    for answer in (whole, chat, last):
        assert answer.usage is not None
        assert answer.usage.prompt_tokens_details is not None
        assert answer.usage.prompt_tokens_details.cached_tokens == 0


@pytest.mark.parametrize("stream", [False, True])
def test_prompts_are_summed(served: Served, stream: bool) -> None:
    body: dict[str, Any] = {"prompt": ["a", "cold", "abc"], "n": 2}
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        usage = events(post(served, COMPLETIONS, body).text)[-1]["usage"]
    else:
        usage = post(served, COMPLETIONS, body).json()["usage"]
    assert usage["prompt_tokens"] == 1 + 4 + 3
    assert usage["prompt_tokens_details"] == {"cached_tokens": 16 + 0 + 48}


def test_a_prompt_that_is_only_scored_says_it(served: Served) -> None:
    body = {"prompt": "hi", "max_tokens": 0, "echo": True, "logprobs": 1}
    usage = post(served, COMPLETIONS, body).json()["usage"]
    assert usage["completion_tokens"] == 0
    assert usage["prompt_tokens_details"] == {"cached_tokens": 32}


def test_metrics_count_looked_up_and_found_tokens(served: Served) -> None:
    def counts() -> tuple[float, float]:
        lines = httpx.get(f"{served.url}/metrics").text.splitlines()
        values = [
            float(line.rpartition(" ")[2])
            for name in ("jserve_prefix_query_tokens_total{", "jserve_prefix_hit_tokens_total{")
            for line in lines
            if line.startswith(name)
        ]
        assert len(values) == 2
        return values[0], values[1]

    queried, found = counts()
    post(served, COMPLETIONS, {"prompt": ["abcd", "cold"]})
    assert counts() == (queried + 8, found + 64)


def test_a_stop_string_loses_nothing(served: Served) -> None:
    """The first delta shows nothing then, since it may begin the stop string."""
    body = {"prompt": "hi", "stop": "okay", "stream": True}
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events(post(served, COMPLETIONS, body | {"stream_options": options}).text)
    for chunk in chunks:
        assert chunk["usage"]["prompt_tokens_details"] == {"cached_tokens": 32}
