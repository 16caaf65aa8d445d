"""CPU of one gateway process per token, and what it can carry: many streams, no model.

    python benchmarks/serving/gateway.py --streams 1000 --step_ms 200 100 50

The gateway is the real one (`--role=gateway`); the engine is a process that only repeats prompts,
one step of `tokens_per_step` tokens for every stream per `step_ms`. All streams start at once. CPU
is user and system time of the process from the first request to the last answer: what a request
costs is shared by its tokens. Where the gateway's CPU is near 100 % it is saturated; the row with
most events is what it can carry. Steps far too short (0: the engine never waits) show how it then
merges tokens into fewer events.
"""

import argparse
import asyncio
import contextlib
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import uvloop

from benchmarks.serving import driver, failures, report, workload
from benchmarks.serving.driver import Load
from benchmarks.serving.failures import BenchmarkError
from benchmarks.serving.grpc_target import GrpcTarget
from benchmarks.serving.http_target import HttpOptions, HttpTarget
from benchmarks.serving.metrics import Slo, summarize
from benchmarks.serving.servers import ServerProcess, free_port, until_ready
from benchmarks.serving.target import Target
from jserve.engine.build.platform import raise_file_limit


@dataclass(frozen=True, slots=True)
class Ports:
    """Ports of the processes on loopback."""

    http: int
    grpc: int


def target_of(arguments: argparse.Namespace, ports: Ports) -> Target:
    """The gateway's front end that is measured."""
    if arguments.api == "grpc":
        return GrpcTarget(f"127.0.0.1:{ports.grpc}")
    return HttpTarget(f"http://127.0.0.1:{ports.http}", HttpOptions(api=arguments.api))


def measure(arguments: argparse.Namespace, step_ms: float, logs: Path) -> dict[str, Any]:
    """Starts engine and gateway, puts the load on them, stops them."""
    with tempfile.TemporaryDirectory(prefix="jserve-") as folder:  # its mode is 0700
        return _measure(arguments, step_ms, logs, f"unix:{folder}/engine.sock")


def _measure(
    arguments: argparse.Namespace, step_ms: float, logs: Path, address: str
) -> dict[str, Any]:
    ports = Ports(free_port(), free_port())
    engine = [
        *(sys.executable, "-m", "benchmarks.serving.simulated_engine", "--address", address),
        *("--slots", str(arguments.streams), "--step_ms", str(step_ms)),
        *("--tokens_per_step", str(arguments.tokens_per_step)),
    ]
    gateway = [
        *(sys.executable, "-m", "jserve", f"--config={arguments.config}", "--role=gateway"),
        *(f"--engine_address={address}", f"--http_port={ports.http}", f"--grpc_port={ports.grpc}"),
    ]
    with contextlib.ExitStack() as stack:
        processes = [
            stack.enter_context(ServerProcess(name, command, logs / f"{name}.log"))
            for name, command in (("engine", engine), ("gateway", gateway))
        ]
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            load, cpu_s = runner.run(_load(arguments, ports, processes))
        for process in processes:
            process.check_alive()
    return _row(step_ms, load, *cpu_s)


async def _load(
    arguments: argparse.Namespace, ports: Ports, processes: list[ServerProcess]
) -> tuple[Load, list[float]]:
    """The load, and the CPU seconds of each process while it ran."""
    await until_ready(lambda: target_of(arguments, ports), processes[1], timeout_s=60)
    target = target_of(arguments, ports)
    jobs = workload.open_loop(
        float("inf"),
        1,
        arguments.streams,
        arguments.prompt_tokens,
        arguments.max_tokens,
        (arguments.seed,),
    )
    try:
        await target.check()
        before = [_cpu_s(process.pid) for process in processes]
        load = await driver.open_loop(target, jobs, timeout_s=600, on_done=lambda record: None)
        after = [_cpu_s(process.pid) for process in processes]
    finally:
        await target.close()
    return load, [end - start for start, end in zip(before, after, strict=True)]


def _cpu_s(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def _row(step_ms: float, load: Load, engine_cpu_s: float, gateway_cpu_s: float) -> dict[str, Any]:
    summary = summarize(load, Slo())
    tokens, chunks, seconds = summary["output_tokens"], summary["chunks"], load.duration_s
    if not tokens:
        kinds = "; ".join(summary["error_kinds"])
        raise BenchmarkError(f"no request of {summary['requests']} was answered: {kinds}")
    return {
        "step_ms": step_ms,
        "errors": summary["errors"],
        "tokens_per_s": round(tokens / seconds, 1),
        "events_per_s": round(chunks / seconds, 1),
        "tokens_per_event": round(tokens / chunks, 3),
        "gateway_us_per_token": round(gateway_cpu_s / tokens * 1e6, 1),
        "gateway_us_per_event": round(gateway_cpu_s / chunks * 1e6, 1),
        "gateway_cpu_percent": round(gateway_cpu_s / seconds * 100, 1),
        "engine_cpu_percent": round(engine_cpu_s / seconds * 100, 1),
        "client_cpu_percent": round(load.client_cpu_s / seconds * 100, 1),
        "ttft_ms_p50": summary["ttft_ms"]["p50"],
        "chunk_gap_ms_p99": (summary["chunk_gap_ms"] or {}).get("p99"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/tiny_random.py", help="gives the tokenizer")
    parser.add_argument("--api", choices=["completions", "chat", "grpc"], default="completions")
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--step_ms", type=float, nargs="+", default=[200, 100, 50])
    parser.add_argument("--tokens_per_step", type=int, default=1)
    parser.add_argument("--prompt_tokens", type=int, default=128)
    parser.add_argument("--max_tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    raise_file_limit()
    logs = Path(tempfile.mkdtemp(prefix="gateway-"))
    rows = [measure(arguments, step_ms, logs) for step_ms in arguments.step_ms]
    columns = [[name, *(report.number(row[name]) for row in rows)] for name in rows[0]]
    print(report.grid(["", *("" for _ in rows)], columns))
    most = max(rows, key=lambda row: row["events_per_s"])
    print(
        f"\nat most {report.number(most['events_per_s'])} events/s "
        f"({report.number(most['tokens_per_s'])} tokens/s) over {arguments.streams} streams: "
        f"{report.number(most['gateway_us_per_token'])} µs of gateway CPU per token, "
        f"{report.number(most['gateway_cpu_percent'])} % of a core"
    )
    print(report.json_line("gateway", vars(arguments), rows=rows))
    return 1 if any(row["errors"] for row in rows) else 0


if __name__ == "__main__":
    failures.run(main)
