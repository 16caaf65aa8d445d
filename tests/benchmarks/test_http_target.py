"""Requests to each kind of server, the reading of its chunks, and messages for its user."""

import asyncio

import pytest

from benchmarks.serving.failures import BenchmarkError, NotReady, RequestFailed
from benchmarks.serving.http_target import HttpOptions, HttpTarget
from benchmarks.serving.record import Record
from benchmarks.serving.workload import Job
from tests.benchmarks.scripted_server import (
    END,
    SSE_HEAD,
    chunked,
    completion,
    models,
    plain,
    serving,
    sse,
    usage,
)

JOB = Job(at_s=0, prompt_tokens=5, output_tokens=3, seed=(1, 2))
ANSWER = chunked(
    sse(completion("a"), completion("bc"), completion("d", "length"), usage(5, 3), "[DONE]")
)


def asked(answer, model_list=None, job=JOB, **options):
    """Sends one job after the check; returns its record, its body and the server's description."""
    model_list = models("m", owned_by="jserve") if model_list is None else model_list

    async def main():
        async with serving(lambda r: model_list if r.method == "GET" else answer) as server:
            target = HttpTarget(server.url, HttpOptions(**options))
            record = Record()
            try:
                info = await target.check()
                await target.send(target.prepare(job), record)
            finally:
                await target.close()
            return record, server.requests[-1].body, info

    return asyncio.run(main())


def test_jserve_takes_ids_and_a_fixed_length():
    record, body, info = asked(ANSWER)
    assert (info.model, info.dialect, info.prompt) == ("m", "jserve", "ids")
    assert body["prompt"] == JOB.token_ids(100, 500)
    assert len(body["prompt"]) == 5
    assert (body["max_tokens"], body["temperature"], body["ignore_eos"]) == (3, 0, True)
    assert body["stream_options"] == {"include_usage": True}
    assert (record.prompt_tokens, record.output_tokens) == (5, 3)
    assert record.chunk_chars == [1, 2, 1]
    assert not record.tells_chunks
    assert record.sent_s < record.chunk_s[0]


def test_vllm_tells_usage_in_every_chunk():
    so_far = [{"prompt_tokens": 5, "completion_tokens": n} for n in (1, 2, 5, 6)]
    chunks = [
        completion(text, finish, usage=told)
        for text, finish, told in zip("ab\0c", (None, None, None, "length"), so_far, strict=True)
    ]
    chunks[1]["choices"][0]["text"] = ""  # half a character
    answer = chunked(sse(*chunks, usage(5, 6), "[DONE]"))
    record, body, info = asked(answer, models("m", owned_by="vllm", max_model_len=77))
    assert (info.dialect, info.max_model_len) == ("vllm", 77)
    assert body["stream_options"]["continuous_usage_stats"] is True
    assert record.tokens_by_chunk() == [1, 4, 1]
    assert record.output_tokens == 6


def test_llama_cpp_tells_timings_in_every_chunk():
    chunks = [completion(t, timings={"predicted_n": n}) for t, n in (("a", 1), ("b", 3))]
    last = completion("", "length", timings={"predicted_n": 3})
    answer = chunked(sse(*chunks, last | usage(5, 3) | {"choices": last["choices"]}, "[DONE]"))
    record, body, info = asked(answer, models("m", owned_by="llamacpp"))
    assert info.dialect == "llama.cpp"
    assert (body["ignore_eos"], body["cache_prompt"], body["repeat_penalty"]) == (True, False, 1)
    assert record.tokens_by_chunk() == [1, 2]
    assert record.output_tokens == 3


def test_an_unknown_server_gets_text_and_nothing_special():
    answer = chunked(sse(completion("a"), completion("b", "stop"), "[DONE]"))
    record, body, info = asked(answer, models("m", owned_by="somebody"))
    assert info.dialect == "openai"
    assert len(body["prompt"].split()) == 5
    assert "ignore_eos" not in body
    assert record.output_tokens is None
    assert record.tokens == 2


def test_chat():
    def delta(**fields):
        return {"choices": [{"index": 0, "delta": fields, "finish_reason": None}]}

    end = {"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]}
    chunks = [delta(role="assistant", content=""), delta(content="x"), delta(content="y"), end]
    record, body, _ = asked(chunked(sse(*chunks, usage(9, 2), "[DONE]")), api="chat")
    assert body["messages"] == [{"role": "user", "content": JOB.text()}]
    assert len(record.chunk_s) == 2  # the role alone is no text
    with pytest.raises(BenchmarkError, match="--prompt ids"):
        asked(ANSWER, api="chat", prompt="ids")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (chunked(sse(completion("a"), {"error": {"message": "it died"}})), "error event: it died"),
        (chunked(sse(completion("a"))), "ended before the answer was complete"),
        (chunked(sse("nonsense")), "not a chunk of an answer: 'nonsense'"),
        (chunked(sse({"id": 1})), "not a chunk of an answer"),
        (chunked(sse("[1]")), "not a chunk of an answer"),
        ([SSE_HEAD + b"\r\n", sse(completion("a")), END], "ended before the answer was complete"),
    ],
)
def test_an_answer_that_is_not_one(answer, message):
    async def main():
        good = iter([ANSWER])
        pages = lambda r: models("m") if r.method == "GET" else next(good, answer)  # noqa: E731
        async with serving(pages) as server:
            target = HttpTarget(server.url, HttpOptions())
            await target.check()
            try:
                with pytest.raises(RequestFailed, match=message):
                    await target.send(target.prepare(JOB), Record())
            finally:
                await target.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("model_list", "answer", "options", "words"),
    [
        (plain(b"{}", 404), ANSWER, {}, ("HTTP 404", "--url must be the root")),
        (plain(b"<html>", 200, "text/html"), ANSWER, {}, ("lists no models", "mend --url")),
        (plain(b'{"data": 3}'), ANSWER, {}, ("lists no models",)),
        (models(), ANSWER, {}, ("lists no model",)),
        (
            models("m", "n"),
            ANSWER,
            {"model": "x"},
            ("does not serve 'x'", "--model to one of m, n"),
        ),
        (models("m"), plain(b"no", 404), {}, ("/v1/completions: HTTP 404: no", "--url")),
        (models("m"), plain(b"no", 401), {}, ("HTTP 401", "--api_key")),
        (models("m"), plain(b"no", 400), {}, ("refuses the requests: HTTP 400: no", "--dialect")),
        (models("m"), plain(b"{}"), {}, ("does not stream", "application/json", "--api")),
        ([b"SSH-2.0\r\n", END], ANSWER, {}, ("not an HTTP answer", "mend --url")),
        (models("m"), [END], {}, ("without an answer",)),
    ],
)
def test_the_user_is_told_what_to_mend(model_list, answer, options, words):
    with pytest.raises(BenchmarkError) as caught:
        asked(answer, model_list, **options)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message
    assert not isinstance(caught.value, NotReady)


def test_a_server_that_starts_is_not_ready():
    with pytest.raises(NotReady, match="wait until the server is ready"):
        asked(plain(b'{"error": {"message": "loading"}}', 503))
    with pytest.raises(NotReady, match="HTTP 503"):
        asked(ANSWER, plain(b"loading", 503))

    async def nobody():
        async with serving(lambda r: []) as server:
            url = server.url
        await HttpTarget(url, HttpOptions()).check()

    with pytest.raises(NotReady, match=r"Connection refused.*start the server or mend --url"):
        asyncio.run(nobody())
