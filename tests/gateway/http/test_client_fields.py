"""What clients send unasked, and the defaults and answers that they expect."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from jserve.core.request import SamplingParams
from tests.gateway.http.http_serving import CHAT, COMPLETIONS, END, Served, serving

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
