"""Every way to ask gives the same answer: HTTP, the official client, gRPC, the command line."""

import asyncio
import subprocess
import sys

import grpc
import httpx
import openai
import pytest

from jserve.proto import inference_pb2, inference_pb2_grpc, types_pb2
from tests.e2e.server import REPOSITORY, Server, events, user_environment

PROMPT = "The capital of France is"
MAX_TOKENS = 24


@pytest.fixture(scope="module")
def greedy(server: Server) -> str:
    reply = server.post(
        "/v1/completions", {"prompt": PROMPT, "max_tokens": MAX_TOKENS, "temperature": 0}
    )
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"][0]["text"]


def test_http_stream(server: Server, greedy: str) -> None:
    body = {"prompt": PROMPT, "max_tokens": MAX_TOKENS, "temperature": 0, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        text = "".join(event["choices"][0]["text"] for event in events(reply.iter_lines()))
    assert text == greedy


def test_openai_client(server: Server, greedy: str) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        model = client.models.list().data[0].id
        answer = client.completions.create(
            model=model, prompt=PROMPT, max_tokens=MAX_TOKENS, temperature=0
        )
        assert answer.choices[0].text == greedy
        assert answer.usage is not None
        assert answer.usage.completion_tokens <= MAX_TOKENS
        chat = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "Hi"}], max_tokens=4
        )
        assert chat.choices[0].message.role == "assistant"


def test_the_second_turn_of_a_chat_finds_the_first(server: Server) -> None:
    hits_before = hit_tokens(server)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as client:
        model = client.models.list().data[0].id
        turns = [{"role": "user", "content": "Count the stars above the harbour. " * 3}]
        cached: list[int] = []
        lengths: list[int] = []
        for question in ("And those below?", ""):
            answer = client.chat.completions.create(
                model=model, messages=turns, max_tokens=40, temperature=0
            )
            usage = answer.usage
            assert usage is not None
            assert usage.prompt_tokens_details is not None
            cached.append(usage.prompt_tokens_details.cached_tokens or 0)
            lengths.append(usage.prompt_tokens)
            turns.append({"role": "assistant", "content": answer.choices[0].message.content})
            turns.append({"role": "user", "content": question})
    assert cached[0] == 0
    # At least the first question; of the answer, as much as its text is tokenized alike again.
    page = 16
    assert lengths[0] // page * page - page <= cached[1] < lengths[1]
    assert cached[1] % page == 0
    assert hit_tokens(server) - hits_before == cached[1]


def hit_tokens(server: Server) -> float:
    return server.gauge("jserve_prefix_hit_tokens_total")


def test_async_openai_client_streams(server: Server, greedy: str) -> None:
    async def ask() -> str:
        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="unused", max_retries=0
        ) as client:
            stream = await client.completions.create(
                model=(await client.models.list()).data[0].id,
                prompt=PROMPT,
                max_tokens=MAX_TOKENS,
                temperature=0,
                stream=True,
            )
            return "".join([chunk.choices[0].text async for chunk in stream])

    assert asyncio.run(ask()) == greedy


def test_grpc_client(server: Server, greedy: str) -> None:
    sampling = types_pb2.SamplingParams(max_tokens=MAX_TOKENS, temperature=0)
    request = inference_pb2.GenerateRequest(text=PROMPT, sampling=sampling)
    with grpc.insecure_channel(server.grpc_address) as channel:
        responses = list(inference_pb2_grpc.InferenceStub(channel).Generate(request, timeout=60))
    assert "".join(response.text for response in responses) == greedy


def test_command_line(server: Server, greedy: str) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "jserve", "generate", PROMPT),
            *("--config=configs/tiny_random.py", f"--max_tokens={MAX_TOKENS}"),
            *("--temperature=0", "--nochat"),
        ],
        cwd=REPOSITORY,
        env=user_environment(),
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip("\n") == greedy.rstrip("\n")


def test_nothing_compiles_after_start(server: Server, greedy: str) -> None:
    assert server.gauge("jserve_compiles_after_warmup_total") == 0
