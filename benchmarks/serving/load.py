"""Throughput and latency of a running server under a load.

    python benchmarks/serving/load.py --streams 1 8 32 --prompt_tokens 128 --max_tokens 128
    python benchmarks/serving/load.py --rate 1 2 4 --cv 2 --requests 200 --slo_ttft_ms 500
    python benchmarks/serving/load.py --rate inf --requests 64 --url grpc://127.0.0.1:8500
    python benchmarks/serving/load.py --trace conv.csv --length_divisor 8 --rate 2 --limit 300

A closed loop of streams that each send one request after another; an open loop whose requests come
at given times, whatever the server does; or all requests at once. Any OpenAI-compatible server, or
jserve's gRPC service. Prompts share nothing, also with those of the run before; `--shared_tokens`
measures with hits of a server's prefix cache instead. Prints one table and one JSON line;
`metrics.py` defines what is measured.
"""

import argparse
import asyncio

import uvloop

from benchmarks.serving import failures, options, plots, report
from benchmarks.serving.dialects import DIALECTS
from benchmarks.serving.session import Run, visit
from benchmarks.serving.target import ServerInfo
from jserve.engine.build.platform import raise_file_limit


def show(title: str, runs: list[Run]) -> None:
    """The table, with what must be known to read it."""
    print(f"\n{title}\n" if title else "")
    print(report.table([run.point.label for run in runs], [run.summary for run in runs]))
    for run in runs:
        for note in report.notes(run.summary):
            print(f"  {run.point.label}: {note}")


def measure(arguments: argparse.Namespace) -> tuple[ServerInfo, list[Run]]:
    """Runs the loads of the flags against the server of the flags."""
    points = options.points_of(arguments)

    async def main() -> tuple[ServerInfo, list[Run]]:
        target = options.target_of(arguments, arguments.url, arguments.dialect)
        warm_up = options.warm_up_jobs(arguments)
        return await visit(target, points, warm_up=warm_up, slo=options.slo_of(arguments))

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--url", default="http://127.0.0.1:8000", help="an OpenAI server, or grpc://host:port"
    )
    parser.add_argument("--dialect", choices=["auto", *DIALECTS], default="auto")
    parser.add_argument("--plot", metavar="FILE", help="write a .png or .svg")
    parser.add_argument("--note", help="goes into the JSON line: the server's device, for example")
    options.add_load_flags(parser)
    arguments = parser.parse_args()
    if arguments.plot:
        plots.check(arguments.plot)
    raise_file_limit()
    info, runs = measure(arguments)
    show(f"{info.model} ({info.dialect}, prompts as {info.prompt})", runs)
    if arguments.plot:
        plots.draw(arguments.plot, {info.model: runs})
    rows = [{"load": run.point.label, **run.summary} for run in runs]
    server = {"model": info.model, "dialect": info.dialect, "prompt": info.prompt}
    print(report.json_line("load", options.config_of(arguments), server=server, runs=rows))
    return 0 if any(run.summary["output_tokens"] for run in runs) else 1


if __name__ == "__main__":
    failures.run(main)
