"""SmolLM2's greedy texts are transformers', whichever way one asks a server."""

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import httpx
import openai
import pytest

from jserve.proto import inference_pb2, inference_pb2_grpc, types_pb2
from tests.e2e.server import REPOSITORY, Server, events, serving, user_environment

pytestmark = [pytest.mark.network, pytest.mark.optimized]

CONFIG = "configs/smollm2_135m.py"
MAX_TOKENS = 64
GREEDY = {"max_tokens": MAX_TOKENS, "temperature": 0}
CASES: list[dict[str, Any]] = json.loads(
    (REPOSITORY / "tests/fixtures/weights/smollm2_135m_greedy.json").read_text()
)
PROMPT = next(case for case in CASES if case["messages"] is None)
CHAT = next(case for case in CASES if case["messages"])
CONVERSATION = next(case for case in CASES if case["messages"] and len(case["messages"]) > 1)


@pytest.fixture(scope="module")
def real_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(CONFIG, tmp_path_factory.mktemp("real") / "server.log") as running:
        yield running


def test_http(real_server: Server) -> None:
    """Sends all prompts at once: whatever shares a batch, the answer is the same."""

    def ask(case: dict[str, Any]) -> tuple[str, str, int]:
        if case["messages"]:
            reply = real_server.post(
                "/v1/chat/completions", {"messages": case["messages"], **GREEDY}
            ).json()
            text = reply["choices"][0]["message"]["content"]
        else:
            reply = real_server.post("/v1/completions", {"prompt": case["prompt"], **GREEDY}).json()
            text = reply["choices"][0]["text"]
        return text, reply["choices"][0]["finish_reason"], reply["usage"]["prompt_tokens"]

    with ThreadPoolExecutor(len(CASES)) as pool:
        answers = list(pool.map(ask, CASES))
    assert answers == [
        (case["text"], case["finish_reason"], len(case["prompt_ids"])) for case in CASES
    ]


def test_http_stream(real_server: Server) -> None:
    body = {"prompt": PROMPT["prompt"], "stream": True, **GREEDY}
    with httpx.stream("POST", f"{real_server.url}/v1/completions", json=body, timeout=60) as reply:
        text = "".join(event["choices"][0]["text"] for event in events(reply.iter_lines()))
    assert text == PROMPT["text"]


@pytest.mark.sweep  # `test_clients` has all clients, with a tiny model
def test_openai_client(real_server: Server) -> None:
    with openai.OpenAI(base_url=f"{real_server.url}/v1", api_key="unused", max_retries=0) as client:
        model = client.models.list().data[0].id
        completion = client.completions.create(model=model, prompt=PROMPT["prompt"], **GREEDY)
        assert completion.choices[0].text == PROMPT["text"]
        chunks = client.chat.completions.create(
            model=model, messages=CONVERSATION["messages"], stream=True, **GREEDY
        )
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert text == CONVERSATION["text"]


@pytest.mark.sweep
def test_grpc_client(real_server: Server) -> None:
    sampling = types_pb2.SamplingParams(**GREEDY)
    messages = [inference_pb2.ChatMessage(**message) for message in CONVERSATION["messages"]]
    chat = inference_pb2.Chat(messages=messages)
    asked = (
        (inference_pb2.GenerateRequest(text=PROMPT["prompt"], sampling=sampling), PROMPT),
        (inference_pb2.GenerateRequest(chat=chat, sampling=sampling), CONVERSATION),
    )
    with grpc.insecure_channel(real_server.grpc_address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        for request, case in asked:
            responses = list(stub.Generate(request, timeout=60))
            assert "".join(response.text for response in responses) == case["text"]
            ids = [token for response in responses for token in response.token_ids]
            assert ids == case["token_ids"]


def test_command_line(real_server: Server) -> None:
    """The command starts with the programs that the server has compiled."""
    (message,) = CHAT["messages"]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "jserve", "generate", message["content"]),
            *(f"--config={CONFIG}", f"--max_tokens={MAX_TOKENS}", "--temperature=0"),
        ],
        cwd=REPOSITORY,
        env=user_environment(),
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == CHAT["text"] + "\n"
