"""Parts of the time of a start: imports, device, weights, and each program's trace and compile.

    python -m benchmarks.engine.startup
    python -m benchmarks.engine.startup --config configs/smollm2_135m.py

Two starts in processes of their own: one compiles every program, one loads them from the cache
(which a third start fills if it has to). Weights are made or read while programs compile, on the
same cores. Prints a table and one JSON line.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.engine import options
from benchmarks.serving import report

_EVENTS = {
    "/jax/core/compile/jaxpr_trace_duration": "trace_s",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lower_s",
    "/jax/core/compile/backend_compile_duration": "compile_s",
}


def parse() -> argparse.Namespace:
    parser = options.parser_of(__doc__)
    parser.add_argument("--child", choices=["compile", "load"], help=argparse.SUPPRESS)
    return parser.parse_args()


class CompileTimes:
    """Seconds of JAX's compile phases, by the thread that compiles."""

    def __init__(self) -> None:
        self.programs: dict[str, dict[str, float]] = {}
        self._phases: dict[int, dict[str, float]] = {}

    def on_event(self, event: str, duration_secs: float, **kwargs: Any) -> None:
        """Listens to `jax.monitoring`. A program's trace contains those of its parts."""
        del kwargs
        if name := _EVENTS.get(event):
            phases = self._phases.setdefault(threading.get_ident(), {})
            phases[name] = max(phases.get(name, 0.0), duration_secs)

    def on_program(self, name: str) -> None:
        """The program `name` is ready; its thread had nothing else to do since the last one."""
        phases = self._phases.pop(threading.get_ident(), {})
        self.programs[name] = {part: round(phases.get(part, 0.0), 3) for part in _EVENTS.values()}


def start(arguments: argparse.Namespace) -> dict[str, Any]:
    """Starts an engine in this process, which has not imported JAX before."""
    marks = [time.perf_counter()]

    def lap() -> float:
        marks.append(time.perf_counter())
        return round(marks[-1] - marks[-2], 3)

    import jax

    from benchmarks.engine import engines
    from benchmarks.engine.drive import Driver

    found: dict[str, Any] = {"imports_s": lap()}
    jax.devices()
    found["devices_s"] = lap()
    serve = options.serve_config(arguments)
    cached = arguments.child == "load"
    engine_config = dataclasses.replace(serve.engine, cache_executables=cached)
    serve = dataclasses.replace(serve, engine=engine_config)
    times = CompileTimes()
    jax.monitoring.register_event_duration_secs_listener(times.on_event)
    subject = engines.build(serve, arguments.backend, times.on_program)
    engine = subject.engine
    found["engine_s"] = lap()
    found["phases"] = {f"{name}_s": round(s, 3) for name, s in engine.phases.items()}
    found["programs"] = [
        {
            "name": made.program.name,
            "cached": made.cached,
            "all_s": round(made.seconds, 3),
            **({} if made.cached else times.programs[made.program.name]),
        }
        for made in engine.programs
    ]
    driver = Driver(engine)
    for name in ("first_request_s", "second_request_s"):
        lap()
        driver.add(1, 8, 2)  # its prompt, then one decode step
        for _ in driver.turns():
            pass
        found[name] = lap()
    found["total_s"] = round(
        sum(found[f"{part}_s"] for part in ("imports", "devices", "engine")), 3
    )
    return {**found, "device": engines.device_of(engine)}


def child(kind: str) -> dict[str, Any]:
    """Runs this command in a process of its own; its last line has the results."""
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "benchmarks.engine.startup", *sys.argv[1:], "--child", kind]
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=environment)
    if done.returncode:
        sys.exit(done.returncode)
    return json.loads(done.stdout.splitlines()[-1])


def table(starts: dict[str, dict[str, Any]]) -> str:
    """Seconds by part, one column for each start."""

    def row(name: str, *path: str | int) -> list[str]:
        cells: list[str] = []
        for found in starts.values():
            value: Any = found
            for key in path:
                value = value.get(key) if isinstance(value, dict) else value[key]
            cells.append(report.number(value))
        return [name, *cells]

    first = next(iter(starts.values()))
    rows = [row("imports", "imports_s"), row("device", "devices_s"), row("engine", "engine_s")]
    rows += [row(f"  {name.removesuffix('_s')}", "phases", name) for name in first["phases"]]
    for i, program in enumerate(first["programs"]):
        rows.append(row(f"  {program['name']}", "programs", i, "all_s"))
        rows += [
            row(f"    {part.removesuffix('_s')}", "programs", i, part) for part in _EVENTS.values()
        ]
    rows += [row("all until ready", "total_s")]
    rows += [row("first request", "first_request_s"), row("second", "second_request_s")]
    return report.grid(["seconds", *starts], rows)


def main() -> None:
    arguments = parse()
    if arguments.child:
        print(json.dumps(start(arguments)))
        return
    serve = options.serve_config(arguments)
    starts = {"compiled": child("compile"), "cached": child("load")}
    if not all(program["cached"] for program in starts["cached"]["programs"]):
        starts["cached"] = child("load")  # the one before has filled the cache
    print(table(starts), end="\n\n")
    print(report.json_line("engine_startup", options.config_of(arguments, serve), starts=starts))


if __name__ == "__main__":
    options.run(main)
