"""Servers started and stopped, and their rounds side by side."""

import asyncio
import sys

import pytest

from benchmarks.serving import compare, peers, ratios, report
from benchmarks.serving.driver import Load
from benchmarks.serving.failures import BenchmarkError, NotReady
from benchmarks.serving.metrics import Slo, summarize
from benchmarks.serving.peers import Start, start_command
from benchmarks.serving.record import Record
from benchmarks.serving.servers import ServerProcess, until_ready

START = Start(model="model.gguf", port=1234, streams=4, context=100)


def summary(tokens, seconds, errors=0):
    answer = Record(sent_s=0.0, end_s=1.0, prompt_tokens=3, output_tokens=tokens)
    answer.arrive(0.5, "a")
    answer.arrive(1.0, "b")
    failed = [Record(error="no") for _ in range(errors)]
    return summarize(Load([answer, *failed], seconds, 0.0), Slo())


def test_ratios_are_of_the_same_round():
    first, other = [summary(10, 1.0), summary(30, 1.0)], [summary(5, 1.0), summary(10, 1.0)]
    rates = dict(report.throughput_rows())["output tokens/s"]
    assert ratios.by_round(rates, first, other) == [2.0, 3.0]
    shown = ratios.table({"new": first, "old": other})
    (line,) = (line for line in shown.splitlines() if line.startswith("output tokens/s"))
    assert line.split() == ["output", "tokens/s", "20", "7.5", "2.500", "2.000–3.000"]
    assert "goodput" not in shown


def test_cached_tokens_are_said():
    told = summary(10, 1.0) | {"cached_tokens": 16}
    rounds = {"new": [told, told], "old": [summary(10, 1.0)]}
    assert ratios.cached(rounds) == "cached tokens: new 32, old –"


def test_unequal_work_is_said():
    same = {"new": [summary(10, 1.0)], "old": [summary(10, 2.0)]}
    assert ratios.unequal(same) == []
    other = {"new": [summary(10, 1.0)], "old": [summary(9, 1.0, errors=2)]}
    assert ratios.unequal(other) == [
        "not the same work: output_tokens of a request: new 10, old 9",
        "old: 2 requests failed",
    ]


def test_the_table_of_loads():
    shown = report.table(["a", "b"], [summary(10, 1.0), summary(2000, 1.0, errors=1)])
    rows = {line[:18].strip(): line[18:].split() for line in shown.splitlines()}
    assert rows["errors"] == ["0", "1"]
    assert rows["output tokens/s"] == ["10", "2,000"]
    assert rows["TTFT ms p99"] == ["500", "500"]
    assert "send lag ms p99" not in rows
    assert report.notes(summary(2, 1.0, errors=1)) == ["1 × no"]


def test_notes_say_what_is_not_as_asked():
    told = summary(4, 1.0) | {"asked_tokens": [1, 8], "send_lag_ms": {"p99": 50.0, "max": 60.0}}
    assert report.notes(told) == [
        "ITL: the tokens of each chunk are estimated from the length of its text",
        "prompts had 3 times the tokens that were asked for",
        "answers had 0.5 times the tokens that were asked for",
        "requests were sent up to 60 ms late: the client was too busy",
    ]


def test_peers_are_started_for_a_model(monkeypatch, tmp_path):
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    model = tmp_path / "model.gguf"
    model.touch()
    start = Start(str(model), port=1234, streams=4, context=100)
    command = start_command("llama.cpp", start)
    assert command[0] == "llama-server"
    assert command[command.index("--ctx-size") + 1] == "400"
    assert start_command("vllm", start)[:3] == ["vllm", "serve", str(model)]
    assert f"model.source={model}" in start_command("jserve", start)
    config = Start("configs/tiny_random.py", port=1234, streams=4, context=100)
    assert "--config=configs/tiny_random.py" in start_command("jserve", config)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("llama.cpp", ("llama-server is not here", "--server 'llama.cpp=…")),
        ("vllm", ("vllm is not here", "pip install vllm")),
        ("xllamacpp", ("xllamacpp is not here", "pip install xllamacpp")),
        ("nothing", ("one of jserve, llama.cpp",)),
        ("jserve", ("no such path", ".gguf")),
    ],
)
def test_what_is_missing_is_named(kind, words, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: object() if name == "jserve" else None
    )
    with pytest.raises(BenchmarkError) as caught:
        start_command(kind, START)
    assert all(word in str(caught.value) for word in words)


def test_every_peer_speaks_a_known_dialect():
    from benchmarks.serving.dialects import DIALECTS

    assert all(peer.dialect in DIALECTS for peer in peers.PEERS.values())


def test_contestants_come_in_their_order():
    parse = compare._parser().parse_args
    flags = ["--url", "b=http://b:1", "--server", "a=serve --port={port} 'x y'"]
    b, a = compare.contestants_of(parse(flags))
    assert (b.name, b.url, b.command) == ("b", "http://b:1", None)
    port = a.url.rpartition(":")[2]
    assert a.command == ("serve", f"--port={port}", "x y")
    own = [*flags, "--url", "a=http://127.0.0.1:77", "--dialect", "a=vllm"]
    assert compare.contestants_of(parse(own))[1].url == "http://127.0.0.1:77"
    assert compare.contestants_of(parse(own))[1].dialect == "vllm"
    with pytest.raises(BenchmarkError, match="two servers"):
        compare.contestants_of(parse(flags[:2]))


class NeverReady:
    async def check(self):
        raise NotReady("nobody there")

    async def close(self):
        pass


def wait_for(server, timeout_s=5.0):
    asyncio.run(until_ready(NeverReady, server, timeout_s))


def test_a_server_that_ends_is_noticed_with_its_last_words(tmp_path):
    command = [sys.executable, "-c", "print('no such model'); raise SystemExit(3)"]
    with (
        ServerProcess("peer", command, tmp_path / "log") as server,
        pytest.raises(BenchmarkError, match=r"peer ended with code 3.*no such model"),
    ):
        wait_for(server)


def test_a_server_that_never_answers(tmp_path):
    with (
        ServerProcess("peer", ["sleep", "60"], tmp_path / "log") as server,
        pytest.raises(BenchmarkError, match=r"not ready after 0\.01 s: nobody there"),
    ):
        wait_for(server, 0.01)
    with pytest.raises(BenchmarkError, match="ended with code -15"):
        server.check_alive()
    with pytest.raises(NotReady):
        wait_for(None)


def test_a_command_that_is_not_there(tmp_path):
    with pytest.raises(BenchmarkError, match="peer: cannot start 'no-such-server'"):
        ServerProcess("peer", ["no-such-server"], tmp_path / "log").__enter__()


def test_a_server_that_ignores_the_signal_is_killed(tmp_path):
    script = (
        "import signal, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True); "
        "time.sleep(60)"
    )
    log = tmp_path / "log"
    server = ServerProcess("peer", [sys.executable, "-c", script], log, stop_timeout_s=0.05)
    with server:
        while not log.read_bytes():
            pass
    with pytest.raises(BenchmarkError, match="ended with code -9"):
        server.check_alive()
