"""CPU time of the host for each run of a program, in a real engine whose device has little to do.

    python -m benchmarks.engine.host
    python -m benchmarks.engine.host --slots 256 --decode_steps 8 --model smollm2-135m

All slots decode. One run is one plan: up to `decode_steps` decode steps of every slot. plan and
commit are the scheduler's, submit packs and starts, collect takes the result apart; waiting for the
device is left out. `host_scheduler.py` measures the scheduler alone. Prints a table, one JSON line.
"""

import argparse
import dataclasses
from typing import Any

import jax
import numpy as np

from benchmarks.engine import drive, engines, options
from benchmarks.engine.drive import Driver, HostTimes
from benchmarks.engine.engines import Subject
from benchmarks.serving import report
from jserve.config import ServeConfig

_PROMPT = 32


def parse() -> argparse.Namespace:
    parser = options.parser_of(__doc__, model="tiny")
    parser.add_argument("--slots", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--decode_steps", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--turns", type=int, default=40, help="runs of the program that are timed")
    return parser.parse_args()


def sized(serve: ServeConfig, slots: int, decode_steps: int, turns: int) -> ServeConfig:
    """The config with `slots` slots, pages for all of them, and one program of each kind."""
    tokens = _PROMPT + (turns + 8) * decode_steps + 64
    engine = dataclasses.replace(
        serve.engine,
        num_slots=slots,
        num_pages=slots * (tokens // serve.engine.page_size + 4),
        max_model_len=min(2048, tokens + 64),
        mixed_tokens=(2 * slots,),
        decode_rows=(slots,),
        decode_steps=decode_steps,
    )
    return dataclasses.replace(serve, engine=engine)


def measure(subject: Subject, turns: int) -> dict[str, Any]:
    """Medians of microseconds by part, and percentiles of their sum, with all slots live."""
    engine = subject.engine
    driver = Driver(engine)
    driver.warm_up()
    (timed,) = drive.decode(driver, [engine.info.num_slots], _PROMPT, turns)
    us = np.array([turn.host for turn in timed]) * 1e6
    runs_us = np.array([turn.device_s for turn in timed]) * 1e6
    total = us.sum(axis=1)
    medians = np.round(np.median(us, axis=0), 1).tolist()
    return {
        **{f"{part}_us": us for part, us in zip(HostTimes._fields, medians, strict=True)},
        "total_us": round(float(np.median(total)), 1),
        "total_p90_us": round(float(np.percentile(total, 90)), 1),
        "run_ms": round(float(np.median(runs_us)) / 1e3, 2),
        "cached_tokens": engine.scheduler.stats().prefix_hit_tokens,
        "parameters": len(jax.tree.leaves(engine.executor._params)),
    }


def main() -> None:
    arguments = parse()
    serve = options.serve_config(arguments)
    cells: list[dict[str, Any]] = []
    device: dict[str, Any] = {}
    for slots in arguments.slots:
        for steps in arguments.decode_steps:
            config = sized(serve, slots, steps, arguments.turns)
            subject = engines.build(config, arguments.backend)
            device = engines.device_of(subject.engine)
            found = measure(subject, arguments.turns)
            cells.append({"slots": slots, "decode_steps": steps, **found})
    header = ["slots", "steps", *(f"{part} µs" for part in HostTimes._fields)]
    header += ["all µs p50", "p90", "run ms", "cached tokens"]
    rows = [
        [report.number(value) for name, value in cell.items() if name != "parameters"]
        for cell in cells
    ]
    print(report.grid(header, rows), end="\n\n")
    line = options.config_of(arguments, serve)
    print(report.json_line("engine_host", line, device=device, cells=cells))


if __name__ == "__main__":
    options.run(main)
