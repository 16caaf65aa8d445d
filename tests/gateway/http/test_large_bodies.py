"""Bodies above 64 kB: read in another process, with the answers of small ones."""

import json
import threading
from collections.abc import Iterator

import httpx
import pytest

from tests.gateway.http.http_serving import CHAT, COMPLETIONS, END, Served, error_of, serving

PADDING = " " * (70 << 10)  # white space between tokens of JSON means nothing


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as served:
        yield served


def post(served: Served, path: str, body: bytes) -> httpx.Response:
    headers = {"content-type": "application/json"}
    return httpx.post(served.url + path, content=body, headers=headers, timeout=30)


def without_ids(answer: dict) -> dict:
    return {key: value for key, value in answer.items() if key not in ("id", "created")}


MESSAGES = [{"role": "user", "content": [{"type": "text", "text": "hé"}]}]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, {"prompt": "hé", "max_tokens": 4, "seed": 1, "stop": ["zz"]}),
        (COMPLETIONS, {"prompt": ["a", "b"], "max_tokens": 2, "n": 2}),
        (COMPLETIONS, {"prompt": [[1, 2], [3]], "max_tokens": 2, "echo": True, "logprobs": 2}),
        (COMPLETIONS, {"prompt": [5, 6], "max_tokens": 2, "allowed_token_ids": [5, 6, 6]}),
        (COMPLETIONS, {"prompt": "x", "max_tokens": 2, "logit_bias": {"5": 1.5}, "top_k": -1}),
        (COMPLETIONS, {"prompt": "x", "max_tokens": 5, "min_tokens": 3, "bad_token_ids": [7]}),
        (CHAT, {"messages": MESSAGES, "max_tokens": 3, "top_logprobs": 1, "logprobs": True}),
        ("/tokenize", {"prompt": "hé", "return_token_strs": True}),
        ("/tokenize", {"messages": MESSAGES}),
        ("/detokenize", {"tokens": [104, 195, 169, END]}),
        # Refused:
        (COMPLETIONS, {"prompt": []}),
        (COMPLETIONS, {"prompt": [[1], "a"]}),
        (COMPLETIONS, {"prompt": [[1, 2], [True]]}),
        (COMPLETIONS, {"prompt": [1, END + 1]}),
        (COMPLETIONS, {"prompt": [[]]}),
        (COMPLETIONS, {"prompt": [1] * 5000}),
        (COMPLETIONS, {"prompt": ["x"] * 257}),
        (COMPLETIONS, {"prompt": "x", "max_tokens": 9999}),
        (COMPLETIONS, {"prompt": "x", "max_tokens": 2, "min_tokens": 3}),
        (COMPLETIONS, {"prompt": "x", "max_tokens": "2"}),
        (COMPLETIONS, {"prompt": "x", "temperature": [[]]}),
        (COMPLETIONS, {"prompt": "x", "logit_bias": {str(i): 1 for i in range(301)}}),
        (COMPLETIONS, {"prompt": "x", "allowed_token_ids": []}),
        (COMPLETIONS, {"prompt": "x", "allowed_token_ids": [5], "bad_token_ids": [5]}),
        (COMPLETIONS, {"prompt": "x", "allowed_token_ids": [5] * 300}),
        (COMPLETIONS, {"prompt": "x", "stop": ["y"] * 17}),
        (COMPLETIONS, {"prompt": "x", "nonsense": 1}),
        (COMPLETIONS, {"prompt": "x", "model": "another"}),
        (CHAT, {"messages": MESSAGES * 5000}),
        (CHAT, {"messages": [{"role": "user", "content": 1}]}),
        (CHAT, {"messages": [{"role": "user", "content": "boom"}]}),
        ("/tokenize", {"prompt": "x", "messages": MESSAGES}),
        ("/detokenize", {"tokens": [END + 1]}),
        ("/detokenize", {"tokens": "x"}),
    ],
)
def test_a_large_body_gets_the_answer_of_a_small_one(served: Served, path, body):
    text = json.dumps(body)
    small = post(served, path, text.encode())
    large = post(served, path, (text[:-1] + PADDING + "}").encode())
    assert large.status_code == small.status_code
    assert without_ids(large.json()) == without_ids(small.json())


@pytest.mark.parametrize(
    "body", ["", "[]", "{", '{"a":' * 40 + "1" + "}" * 40, '{"prompt": "\\ud800"}']
)
def test_what_is_no_json_object(served: Served, body: str):
    small = error_of(post(served, COMPLETIONS, body.encode()), 400)
    large = error_of(post(served, COMPLETIONS, (PADDING + body).encode()), 400)
    assert large["message"].split(":")[0] == small["message"].split(":")[0] or not body


HOSTILE = {
    "lists": b'{"prompt": [' + b"[]," * 500_000 + b"[]]}",
    "ids": b'{"prompt": [' + b"5," * 1_500_000 + b"5]}",
    "biases": json.dumps({"prompt": "x", "logit_bias": dict.fromkeys(range(100_000), 1)}).encode(),
    "a deep list": b'{"prompt": ' + b"[" * 4_000_000 + b"]" * 4_000_000 + b"}",
    "wrong type": b'{"prompt": "x", "temperature": [' + b"[]," * 500_000 + b"[]]}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_others_are_served_while_a_large_body_is_read(served: Served, name: str):
    """The other process reads it: the loop that answers everybody is not the one that works."""
    answers: list[int] = []
    done = threading.Event()

    def probe() -> None:
        with httpx.Client(base_url=served.url) as http:
            while not done.is_set():
                answers.append(http.get("/health").status_code)
                done.wait(0.002)

    prober = threading.Thread(target=probe)
    prober.start()
    try:
        response = post(served, COMPLETIONS, HOSTILE[name])
    finally:
        done.set()
        prober.join()
    error_of(response, 400)
    assert len(response.content) < 1000
    assert len(answers) >= 5
    assert set(answers) == {200}


def test_lists_of_ids_as_long_as_the_vocabulary_for_many_prompts(served: Served):
    ids = list(range(END))
    body = {"prompt": ["x"] * 32, "allowed_token_ids": ids, "n": 1, "max_tokens": 1, "seed": 0}
    answer = post(served, COMPLETIONS, json.dumps(body).encode()).json()
    assert [choice["index"] for choice in answer["choices"]] == list(range(32))
    sent = served.engine.submitted[-32:]
    assert all(it.sampling.allowed_token_ids == tuple(ids) for it in sent)
    assert len({id(it.sampling.allowed_token_ids) for it in sent}) == 1  # checked and kept once
