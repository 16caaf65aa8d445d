"""The engine dies under requests of every kind: all are answered as if it had not."""

import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import psutil

from tests.e2e.faults import engine_sockets
from tests.e2e.server import Server, events

BODY = {"prompt": "Once upon a time", "max_tokens": 500, "ignore_eos": True}
REQUESTS = [
    {"temperature": 0},
    {"seed": 7, "temperature": 1.0, "top_p": 0.9},
    {"seed": 8, "presence_penalty": 0.5, "frequency_penalty": 0.3, "repetition_penalty": 1.2},
    {"seed": 9, "n": 2, "max_tokens": 300},
    {"seed": 10, "stop": ["zq", "xj"]},
    {"seed": 11, "logprobs": 3, "max_tokens": 200},
    {"temperature": 0, "logprobs": 1, "echo": True, "max_tokens": 100},
    {"seed": 12, "logit_bias": {"65": 3.0}, "min_tokens": 100},
]


def _streamed(client: httpx.Client, body: dict) -> list[dict]:
    """The choices of a stream, put together."""
    choices: dict[int, dict] = {}
    with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as reply:
        assert reply.status_code == 200  # also while no engine is there
        for event in events(reply.iter_lines()):
            for choice in event.get("choices") or [event]:
                assert "error" not in choice, choice
                whole = choices.setdefault(choice["index"], {"text": "", "tokens": []})
                whole["text"] += choice["text"]
                whole["finish"] = choice["finish_reason"]
                if choice.get("logprobs"):
                    whole["tokens"] += choice["logprobs"]["tokens"]
    return [choices[index] for index in sorted(choices)]


def _whole(client: httpx.Client, body: dict) -> list[dict]:
    reply = client.post("/v1/completions", json=body)
    assert reply.status_code == 200
    return [
        {
            "text": choice["text"],
            "tokens": (choice["logprobs"] or {"tokens": []})["tokens"],
            "finish": choice["finish_reason"],
        }
        for choice in reply.json()["choices"]
    ]


def _answers(server: Server) -> list[list[dict]]:
    """Every request streamed and whole, all at once; more than there are slots."""
    count = 2 * len(REQUESTS)
    limits = httpx.Limits(max_connections=count)
    with (
        httpx.Client(base_url=server.url, timeout=60, limits=limits) as client,
        ThreadPoolExecutor(count) as pool,
    ):
        running = [
            pool.submit(ask, client, BODY | fields)
            for fields in REQUESTS
            for ask in (_streamed, _whole)
        ]
        return [answer.result() for answer in running]


def test_texts_are_those_of_an_engine_that_lived(server: Server) -> None:
    undisturbed = _answers(server)
    for streamed, whole in zip(undisturbed[::2], undisturbed[1::2], strict=True):
        assert [it["text"] for it in streamed] == [it["text"] for it in whole]
    pages, restarts = (
        server.gauge(name) for name in ("jserve_free_pages", "jserve_engine_restarts_total")
    )
    engine = psutil.Process(server.engine_pid)
    sockets = engine_sockets(engine.pid)

    def kill() -> None:
        server.until(lambda: server.gauge("jserve_num_requests_running") > 4, 20)
        engine.kill()

    killer = threading.Thread(target=kill)
    killer.start()
    disturbed = _answers(server)
    killer.join(30)
    assert not engine.is_running()
    assert disturbed == undisturbed
    server.until(server.is_ready)
    assert engine_sockets(server.engine_pid).isdisjoint(sockets)
    assert server.gauge("jserve_free_pages") == pages
    assert server.gauge("jserve_engine_restarts_total") == restarts + 1  # reason="crash"
    assert "Traceback" not in server.output
