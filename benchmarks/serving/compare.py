r"""Servers against each other: the same load on each in turns, several rounds, and the ratios.

    python benchmarks/serving/compare.py --peer jserve=configs/smollm2_135m.py \
        --peer llama.cpp=model.gguf --streams 1 8 --rounds 3
    python benchmarks/serving/compare.py --server 'new=… --http_port={port}' \
        --server 'old=… --http_port={port}' --rate 2 --requests 100
    python benchmarks/serving/compare.py --url a=http://127.0.0.1:8000 --url b=http://127.0.0.1:8001

A server is started, waited for, warmed up, loaded and stopped before the next one starts; then
comes the next round, with other prompts. All get the same prompts at the same times, greedy, with
answers of the same length where the server can be told so. Prints one table per load and one JSON
line. A ratio is that of the first server to another, round by round.
"""

import argparse
import asyncio
import contextlib
import shlex
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.serving import failures, options, peers, plots, ratios, report
from benchmarks.serving.driver import Load
from benchmarks.serving.failures import BenchmarkError
from benchmarks.serving.metrics import summarize
from benchmarks.serving.servers import ServerProcess, free_port, until_ready
from benchmarks.serving.session import Run, visit
from jserve.engine.build.platform import raise_file_limit

Given = tuple[str, str, str]  # flag, name of the server, value


@dataclass(frozen=True, slots=True)
class Contestant:
    """A server of the comparison; without a command it runs already."""

    name: str
    url: str
    command: tuple[str, ...] | None = None
    dialect: str = "auto"


def contestants_of(arguments: argparse.Namespace) -> list[Contestant]:
    """The servers in the order they were first named. Raises BenchmarkError."""
    given: Sequence[Given] = arguments.servers or []
    extra = dict(arguments.peer_args or [])
    dialects = dict(arguments.dialect or [])
    found: dict[str, Contestant] = {}
    for name in dict.fromkeys(name for _, name, _ in given):
        values = {flag: value for flag, other, value in given if other == name}
        port = free_port()
        url = values.get("url", f"http://127.0.0.1:{port}").replace("{port}", str(port))
        command = None
        dialect = dialects.get(name, "auto")
        if "server" in values:
            command = tuple(shlex.split(values["server"].replace("{port}", str(port))))
        elif "peer" in values:
            start = peers.Start(values["peer"], port, arguments.slots, arguments.context)
            command = (*peers.start_command(name, start), *shlex.split(extra.get(name, "")))
            dialect = dialects.get(name, peers.PEERS[name].dialect)
        found[name] = Contestant(name, url, command, dialect)
    if len(found) < 2:
        raise BenchmarkError("name two servers or more with --peer, --server or --url")
    return list(found.values())


def run_rounds(
    arguments: argparse.Namespace, contestants: Sequence[Contestant], logs: Path
) -> dict[str, list[list[Run]]]:
    """Runs by server and round; one server at a time."""
    results: dict[str, list[list[Run]]] = {it.name: [] for it in contestants}
    for number in range(arguments.rounds):
        for contestant in contestants:
            log = logs / f"{contestant.name}-{number}.log"
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runs = runner.run(_one_turn(arguments, contestant, number, log))
            results[contestant.name].append(runs)
            for run in runs:
                print(
                    f"round {number + 1}, {contestant.name}, {run.point.label}: "
                    f"{run.summary['output_tokens_per_s']:g} output tokens/s, "
                    f"{run.summary['errors']} errors",
                    flush=True,
                )
            time.sleep(arguments.pause_s)
    return results


async def _one_turn(
    arguments: argparse.Namespace, contestant: Contestant, number: int, log: Path
) -> list[Run]:
    def make_target() -> Any:
        return options.target_of(arguments, contestant.url, contestant.dialect)

    with contextlib.ExitStack() as stack:
        server = None
        if contestant.command is not None:
            process = ServerProcess(contestant.name, contestant.command, log)
            server = stack.enter_context(process)
        await until_ready(make_target, server, arguments.ready_timeout_s)
        _, runs = await visit(
            make_target(),
            options.points_of(arguments, (number,)),
            warm_up=options.warm_up_jobs(arguments, (number,)),
            slo=options.slo_of(arguments),
            name=f"round {number + 1} {contestant.name}",
        )
        if server is not None:
            server.check_alive()
        return runs


def _named(flag: str, text: str) -> Given:
    name, equals, value = text.partition("=")
    if not equals or not name or not value:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return flag, name, value


def _pair(text: str) -> tuple[str, str]:
    return _named("", text)[1:]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for flag, value, text in (
        ("peer", "KIND=MODEL", f"started here: {', '.join(peers.PEERS)}"),
        ("server", "NAME=COMMAND", "started here; {port} is a free port"),
        ("url", "NAME=URL", "runs already, or where the --server of that name listens"),
    ):
        kind = partial(_named, flag)
        parser.add_argument(
            f"--{flag}", dest="servers", action="append", type=kind, metavar=value, help=text
        )
    parser.add_argument("--peer_args", action="append", type=_pair, metavar="KIND=ARGUMENTS")
    parser.add_argument("--dialect", action="append", type=_pair, metavar="NAME=DIALECT")
    parser.add_argument("--slots", type=int, default=16, help="peers: requests at a time")
    parser.add_argument("--context", type=int, default=2048, help="peers: tokens of a request")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pause_s", type=float, default=1, help="between two turns")
    parser.add_argument("--ready_timeout_s", type=float, default=600)
    parser.add_argument("--logs", help="folder for what the servers print; default: a new one")
    parser.add_argument("--plot", metavar="FILE", help="write a .png or .svg")
    parser.add_argument("--note", help="goes into the JSON line: the servers' device, for example")
    options.add_load_flags(parser)
    return parser


def _all_rounds(rounds: Sequence[Sequence[Run]], arguments: argparse.Namespace) -> list[Run]:
    """The rounds of one server as one run per load."""
    merged: list[Run] = []
    for runs in zip(*rounds, strict=True):
        load = Load(
            [record for run in runs for record in run.load.records],
            sum(run.load.duration_s for run in runs),
            sum(run.load.client_cpu_s for run in runs),
        )
        merged.append(Run(runs[0].point, load, summarize(load, options.slo_of(arguments))))
    return merged


def main() -> int:
    """Parses the flags, runs the rounds, prints the report; 1 when a load got no answer."""
    arguments = _parser().parse_args()
    contestants = contestants_of(arguments)
    points = options.points_of(arguments)  # a wrong load is refused before a start
    if arguments.plot:
        plots.check(arguments.plot)
    raise_file_limit()
    logs = Path(arguments.logs or tempfile.mkdtemp(prefix="compare-"))
    logs.mkdir(parents=True, exist_ok=True)
    results = run_rounds(arguments, contestants, logs)
    rows: list[dict[str, Any]] = []
    is_complete = True
    for i, point in enumerate(points):
        by_server = {name: [runs[i].summary for runs in rounds] for name, rounds in results.items()}
        print(f"\n{point.label}\n\n{ratios.table(by_server)}")
        for note in (ratios.cached(by_server), *ratios.unequal(by_server)):
            print(f"  {note}")
        is_complete &= all(any(it["output_tokens"] for it in its) for its in by_server.values())
        rows.append({"load": point.label, "rounds": by_server})
    print("\nrates: above 1 the first server is better; latencies: below 1")
    if arguments.plot:
        merged = {name: _all_rounds(rounds, arguments) for name, rounds in results.items()}
        plots.draw(arguments.plot, merged)
    print(report.json_line("compare", options.config_of(arguments), loads=rows))
    return 0 if is_complete else 1


if __name__ == "__main__":
    failures.run(main)
