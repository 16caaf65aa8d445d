"""Operation: probes, metrics, request ids, API keys, CORS, many connections, shutdown."""

import asyncio
import json
import logging
import re
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from jserve.core.errors import ConfigError
from jserve.gateway.http.server import HttpServer
from tests.gateway.http.http_serving import COMPLETIONS, MODEL, Served, serving


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with serving() as served:
        yield served


def scrape(http: httpx.Client) -> dict[tuple[str, str], float]:
    """(sample, the one label that is not the model's) → value."""
    response = http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    found: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            rest = {k: v for k, v in sample.labels.items() if k not in ("model_name", "engine")}
            found[sample.name, " ".join(rest.values())] = sample.value
    return found


def test_probes(served: Served) -> None:
    with httpx.Client(base_url=served.url) as http:
        assert http.get("/health").json() == {"status": "alive"}
        assert http.get("/ready").json() == {"status": "ready"}
        assert http.get("/version").json() == {"version": "1.2.3"}
        assert http.head("/health").status_code == 200


def test_metrics_count(served: Served) -> None:
    with httpx.Client(base_url=served.url) as http:
        before = scrape(http)
        for stream in (False, True):
            body = {"prompt": "abc", "max_tokens": 5, "n": 2, "stream": stream}
            http.post(COMPLETIONS, json=body)
        http.post(COMPLETIONS, json={"prompt": ""})
        after = scrape(http)

    def grown(name: str, label: str = "") -> float:
        return after[name, label] - before.get((name, label), 0.0)

    for prefix in ("jserve_", "vllm:"):
        assert grown(prefix + "prompt_tokens_total") == 6
        assert grown(prefix + "generation_tokens_total") == 20
        assert grown(prefix + "time_to_first_token_seconds_count") == 4
        assert grown(prefix + "inter_token_latency_seconds_count") == 16
        assert grown(prefix + "e2e_request_latency_seconds_count") == 4
        assert after[prefix + "num_requests_running", ""] == 0
        assert after[prefix + "kv_cache_usage_perc", ""] == 0
    assert grown("vllm:request_success_total", "length") == 4
    assert grown("http_requests_total", "/v1/completions POST 200") == 2
    assert grown("http_requests_total", "/v1/completions POST 400") == 1
    assert after["process_resident_memory_bytes", ""] > 1e6


def test_made_up_urls_do_not_make_metrics(served: Served) -> None:
    with httpx.Client(base_url=served.url) as http:
        before = len(scrape(http))
        for i in range(20):
            http.request(f"M{i}", f"/made/up/{i}")
        http.get("/v1/models/some/unknown")
        assert len(scrape(http)) <= before + 60  # one or two new handlers with their buckets
        assert not any("made" in label for _, label in scrape(http))


def test_request_ids(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    with httpx.Client(base_url=served.url) as http, caplog.at_level(logging.INFO):
        given = {"x-request-id": "my-id/1"}
        assert http.get("/v1/models", headers=given).headers["x-request-id"] == "my-id/1"
        error = http.post(COMPLETIONS, json={}, headers=given)
        assert error.headers["x-request-id"] == "my-id/1"
        body = {"prompt": "a", "max_tokens": 1, "stream": True}
        assert http.post(COMPLETIONS, json=body, headers=given).headers["x-request-id"] == "my-id/1"
        assert "request my-id/1" in caplog.text
        made = [http.get("/health").headers["x-request-id"] for _ in range(2)]
        assert made[0] != made[1]
        for bad in ("x" * 1000, "with space", "é".encode("latin-1")):
            answered = http.get("/health", headers={"x-request-id": bad}).headers["x-request-id"]
            assert re.fullmatch("[0-9a-f]{32}", answered)
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="x") as client:
        answer = client.completions.create(
            model=MODEL, prompt="a", max_tokens=1, extra_headers={"x-request-id": "theirs"}
        )
        assert answer._request_id == "theirs"
        same = {
            client.completions.create(
                model=MODEL, prompt="a", max_tokens=1, extra_headers={"x-request-id": "theirs"}
            ).id
            for _ in range(3)
        }
        assert len(same) == 3  # an id that a client repeats is no danger


def test_api_keys() -> None:
    with serving(api_keys=("one", "zwei-ü")) as served, httpx.Client(base_url=served.url) as http:
        for path in ("/health", "/ready", "/version", "/metrics"):
            assert http.get(path).status_code == 200
        for header in (None, "Bearer", "Bearer two", "Basic one", "one", "Bearer one2"):
            headers = {} if header is None else {"authorization": header}
            for response in (
                http.get("/v1/models", headers=headers),
                http.post("/tokenize", json={"prompt": "a"}, headers=headers),
                http.get("/nowhere", headers=headers),
            ):
                assert response.status_code == 401
                assert response.headers["www-authenticate"] == "Bearer"
                assert response.json()["error"]["code"] == "invalid_api_key"
                assert response.headers["x-request-id"]
        for key in (b"Bearer one", b"bearer one", "Bearer zwei-ü".encode()):
            assert http.get("/v1/models", headers={"authorization": key}).status_code == 200
        with openai.OpenAI(base_url=f"{served.url}/v1", api_key="one") as client:
            assert [model.id for model in client.models.list()] == [MODEL]
        with (
            openai.OpenAI(base_url=f"{served.url}/v1", api_key="no", max_retries=0) as client,
            pytest.raises(openai.AuthenticationError),
        ):
            client.models.list()


def test_keys_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    path.write_text("[keys.team]\nkey = 'one'\n")
    path.chmod(0o600)
    with serving(api_keys_file=str(path)) as served, httpx.Client(base_url=served.url) as http:
        assert http.get("/v1/models").status_code == 401
        assert http.get("/v1/models", headers={"authorization": "Bearer one"}).status_code == 200


def test_cors(served: Served) -> None:
    origin = {"origin": "https://app.example"}
    ask = origin | {
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization,content-type",
    }
    off = httpx.options(served.url + COMPLETIONS, headers=ask)
    assert off.status_code == 405
    assert not any(name.startswith("access-control") for name in off.headers)
    with (
        serving(cors_origins=("https://app.example",), api_keys=("key",)) as open_served,
        httpx.Client(base_url=open_served.url) as http,
    ):
        allowed = http.options(COMPLETIONS, headers=ask)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://app.example"
        assert "authorization" in allowed.headers["access-control-allow-headers"].lower()
        refused = http.get("/v1/models", headers=origin)  # without its key
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://app.example"
        other = ask | {"origin": "https://evil.example"}
        assert http.options(COMPLETIONS, headers=other).status_code == 400
        plain = http.get("/health", headers={"origin": "https://evil.example"})
        assert "access-control-allow-origin" not in plain.headers


def test_a_kept_alive_connection_is_quick(served: Served) -> None:
    with httpx.Client(base_url=served.url) as http:
        took_s: list[float] = []
        for _ in range(20):
            start_s = time.monotonic()
            http.get("/health")
            took_s.append(time.monotonic() - start_s)
        assert min(took_s[1:]) < 0.02  # Nagle's delay would make it 0.04 s


def test_a_thousand_connections_at_once() -> None:
    """All streams run at the same time, each gets its own text, and nothing is left."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    count = min(1000, (limit - 200) // 2)  # both ends are in this process
    assert count >= 100, "raise RLIMIT_NOFILE"

    async def one(port: int, i: int, started: asyncio.Barrier) -> str:
        body = json.dumps({"prompt": f"{i:04}", "max_tokens": 8, "stream": True}).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        await started.wait()
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
        head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        data = (await reader.read()).decode()
        writer.close()
        await writer.wait_closed()
        events = re.findall(r"^data: (\{.*\})$", data, re.MULTILINE)
        return "".join(json.loads(event)["choices"][0]["text"] for event in events)

    async def all_of_them(port: int) -> list[str]:
        started = asyncio.Barrier(count)
        return await asyncio.gather(*(one(port, i, started) for i in range(count)))

    with serving(num_slots=64, max_queue=1024) as served:
        texts = asyncio.run(all_of_them(served.port))
        assert texts == [f"{i:04}" * 2 for i in range(count)]
        with httpx.Client(base_url=served.url) as http:
            assert scrape(http)["vllm:request_success_total", "length"] == count


def test_stop_waits_for_what_runs() -> None:
    with serving(step_s=0.01) as served:
        body: dict[str, Any] = {"prompt": "a", "max_tokens": 30, "stream": True}
        with httpx.stream("POST", served.url + COMPLETIONS, json=body) as response:
            lines = response.iter_lines()
            next(lines)
            stopping = asyncio.run_coroutine_threadsafe(served.server.stop(), served._loop)
            rest = list(lines)
            assert rest[-2] == "data: [DONE]"
        stopping.result(timeout=5)
        with pytest.raises(httpx.ConnectError):
            httpx.get(served.url + "/health")


def test_a_port_in_use_is_a_config_error(served: Served) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None: ...

    with pytest.raises(ConfigError, match="http_port"):
        HttpServer(app, host="127.0.0.1", port=served.port, drain_s=1.0)
