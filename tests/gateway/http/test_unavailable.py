"""Requests that cannot be served: a full queue, an engine that is absent or dies, a drain."""

import json
import time

import httpx
import openai
import pytest

from tests.gateway.http.http_serving import CHAT, COMPLETIONS, MODEL, error_of, serving


def test_a_full_queue_is_429_with_retry_after() -> None:
    with serving(num_slots=1, max_queue=1, step_s=0.02) as served:
        body = {"prompt": ["a", "b", "c", "d"], "max_tokens": 50}
        for stream in (False, True):
            response = httpx.post(served.url + COMPLETIONS, json=body | {"stream": stream})
            assert error_of(response, 429)["type"] == "rate_limit_error"
            assert int(response.headers["retry-after"]) >= 1
        with (
            openai.OpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=0) as client,
            pytest.raises(openai.RateLimitError),
        ):
            client.completions.create(model=MODEL, prompt=["a", "b", "c", "d"])


def test_no_engine_is_503_and_not_ready() -> None:
    with serving() as served, httpx.Client(base_url=served.url) as http:
        assert http.get("/ready").status_code == 200
        served.do(served.engine.crash)
        for response in (
            http.get("/ready"),
            http.post(COMPLETIONS, json={"prompt": "a"}),
            http.post(COMPLETIONS, json={"prompt": ["a", "b"], "stream": True}),
        ):
            assert error_of(response, 503)["type"] == "service_unavailable_error"
            assert int(response.headers["retry-after"]) >= 1
        assert http.get("/health").status_code == 200
        assert http.get("/metrics").status_code == 200
        served.do(served.engine.restart)
        assert http.get("/ready").status_code == 200
        assert http.post(COMPLETIONS, json={"prompt": "a", "max_tokens": 1}).status_code == 200


def test_an_engine_that_was_never_reached_is_503() -> None:
    with serving() as served, httpx.Client(base_url=served.url) as http:
        info, served.engine.info, served.engine.ready = served.engine.info, None, False
        for response in (
            http.get("/ready"),
            http.get("/v1/models"),
            http.get(f"/v1/models/{MODEL}"),
            http.post(COMPLETIONS, json={"model": MODEL, "prompt": "a"}),
            http.post(CHAT, json={"model": MODEL, "messages": [{"role": "user", "content": "a"}]}),
            http.post("/tokenize", json={"prompt": "a"}),
            http.post("/detokenize", json={"tokens": [1]}),
        ):
            error_of(response, 503)
            assert int(response.headers["retry-after"]) >= 1
        assert "jserve_engine_ready" in http.get("/metrics").text
        served.engine.info, served.engine.ready = info, True
        assert f'model_name="{MODEL}"' in http.get("/metrics").text


def test_a_draining_server_is_not_ready() -> None:
    with serving() as served, httpx.Client(base_url=served.url) as http:
        assert served.call(lambda: served.plane.drain(1.0))
        error_of(http.get("/ready"), 503)
        error_of(http.post(COMPLETIONS, json={"prompt": "a"}), 503)


@pytest.mark.parametrize("prompt", ["a", ["a", "b", "c"]])
def test_an_engine_that_dies_ends_streams_at_once(prompt: object) -> None:
    with serving(step_s=0.01) as served:
        body = {"prompt": prompt, "max_tokens": 4000, "stream": True}
        lines: list[str] = []
        killed_s = 0.0
        with httpx.stream("POST", served.url + COMPLETIONS, json=body) as response:
            for line in response.iter_lines():
                lines.append(line)
                if len(lines) == 10:
                    killed_s = time.monotonic()
                    served.do(served.engine.crash)
        assert json.loads(lines[-4].removeprefix("data: "))["error"]["type"] == "server_error"
        assert lines[-2] == "data: [DONE]"
        assert time.monotonic() - killed_s < 5.0  # by itself it would take 40 s


def test_the_openai_client_sees_an_engine_die() -> None:
    with (
        serving(step_s=0.01) as served,
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="x", max_retries=0) as client,
    ):
        stream = client.completions.create(model=MODEL, prompt="a", max_tokens=4000, stream=True)
        next(stream)
        served.do(served.engine.crash)
        with pytest.raises(openai.APIError, match="engine"):
            for _ in stream:
                pass


def test_an_engine_that_dies_fails_whole_answers() -> None:
    with serving(step_s=0.01) as served:
        served.do(lambda: served._loop.call_later(0.2, served.engine.crash))
        start_s = time.monotonic()
        response = httpx.post(served.url + COMPLETIONS, json={"prompt": "a", "max_tokens": 4000})
        assert error_of(response, 500)["type"] == "server_error"
        assert time.monotonic() - start_s < 5.0  # by itself it would take 40 s


def test_a_drain_out_of_time_ends_streams_with_an_error() -> None:
    with serving(step_s=0.01) as served:
        body = {"prompt": "a", "max_tokens": 4000, "stream": True}
        with httpx.stream("POST", served.url + COMPLETIONS, json=body) as response:
            lines: list[str] = []
            for line in response.iter_lines():
                lines.append(line)
                if len(lines) == 2:
                    assert not served.call(lambda: served.plane.drain(0.05))
        error = json.loads(lines[-4].removeprefix("data: "))["error"]
        assert error["type"] == "service_unavailable_error"
        assert lines[-2] == "data: [DONE]"
